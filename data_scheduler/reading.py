"""Raw bytes to documents: the door to the formats.

A *unit* is the smallest separately readable piece of a file: a byte range of an uncompressed line file, a row group of
a parquet file, a record batch of an Arrow file, a stretch of documents of a token file, or a whole file otherwise.
Nothing is dropped silently: records in = documents + rejects + records the source's filter left out.
"""

import contextlib
import io
import itertools
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import IO

from data_scheduler.config import SourceConfig
from data_scheduler.extract import Extractor
from data_scheduler.formats import columns, csv, datatrove_files, lines, plain, token_index, tokens
from data_scheduler.formats.compression import BOMB_BYTES, CODECS, MOST_EXPANSION
from data_scheduler.formats.records import REASON_CHARACTERS, Records, Unit
from data_scheduler.formats.token_index import TokenIndex
from data_scheduler.paths import DATATROVE, file_kind, open_binary

TOKEN_KINDS = ("megatron", "ds")
LAYOUT_KINDS = ("parquet", "arrow", *TOKEN_KINDS)
"""Formats whose files have parts of their own."""
KEPT_INDEXES = 4
"""Token files whose index is kept: every stretch of a file needs it, and it may be 100 MB."""


class ChangedFile(OSError):
    """A file that is not what it was when it entered the run."""


class UnitReader:
    """Reads the units of one source."""

    def __init__(
        self,
        config: SourceConfig,
        eos_id: int = 0,
        vocab_size: int = 1 << 32,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        """`eos_id` and `vocab_size` are the tokenizer's; only files of token ids need them. `sizes`: bytes of each file
        when it entered the run; a file that has another size now is rejected."""
        self.config = config
        self.extractor = Extractor(config)
        self._vocabulary = tokens.Vocabulary(eos_id, vocab_size)
        self._sizes = sizes or {}
        self._indexes: OrderedDict[str, TokenIndex] = OrderedDict()

    def read(self, unit: Unit) -> Records:
        """All records of a unit. A file that cannot be opened or decoded at all gives one reject that says so."""
        try:
            with self.open(unit.path) as file:
                return self._read(unit, file)
        except OSError as error:
            return unreadable(error)

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[IO[bytes]]:
        """The file of a unit. Raises OSError, also when it is not as large as when it entered the run."""
        with open_binary(path) as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            entered = self._sizes.get(path, size)
            if size != entered:
                raise ChangedFile(f"the file has {size} bytes, {entered} when it entered the run")
            yield file

    def _read(self, unit: Unit, file: IO[bytes]) -> Records:
        kind, suffix = file_kind(unit.path, self.config.format)
        codec = CODECS[suffix] if suffix else None
        if kind == "jsonl":
            return lines.read(file, unit, codec, self.extractor)
        if kind == "parquet":
            return columns.read_parquet(file, unit, self.extractor)
        if kind == "arrow":
            return columns.read_arrow(file, unit, self.extractor)
        if kind == "csv":
            return csv.read(file, codec, self.extractor)
        if self.extractor.band is not None and kind in ("npy", *TOKEN_KINDS):
            return rejected("files of token ids have no number to tell bands by")
        if kind == "npy":
            return tokens.read_npy(file, self._vocabulary)
        if kind in TOKEN_KINDS:
            size = file.seek(0, io.SEEK_END)
            try:
                index = self._index(unit.path, kind, size)
            except ValueError as error:
                return rejected(str(error))
            return tokens.read_indexed(file, size, unit, index, self._vocabulary)
        if kind.startswith(DATATROVE):
            return datatrove_files.read(kind.removeprefix(DATATROVE), file, codec, self.extractor)
        return plain.read(file, codec, self.extractor)

    def _index(self, path: str, kind: str, size: int) -> TokenIndex:
        if path not in self._indexes:
            self._indexes[path] = token_index.read_index(path, kind, size)
            if len(self._indexes) > KEPT_INDEXES:
                self._indexes.popitem(last=False)
        return self._indexes[path]


def rejected(reason: str) -> Records:
    """What a unit that cannot be read gives: one reject."""
    records = Records()
    records.reject(reason)
    return records


def unreadable(error: OSError) -> Records:
    """What a file that cannot be opened gives: one reject."""
    return rejected(str(error) if isinstance(error, ChangedFile) else f"cannot be read: {error.strerror or error}")


def read_documents(path: str, format: str = "auto", text_key: str = "text") -> Iterator[str]:
    """Every readable text of a whole file, in order; for tools that look at data outside a run."""
    config = SourceConfig.model_validate({"name": "file", "paths": [path], "format": format, "text_key": text_key})
    reader = UnitReader(config)
    for unit in whole_file(path, format):
        yield from (text for text in reader.read(unit).documents if isinstance(text, str))


def whole_file(path: str, format: str = "auto") -> list[Unit]:
    """Units that together are the file. Raises OSError or ValueError when a column file has no readable footer."""
    layout = column_layout(path, format)
    return [Unit(path, 0, -1)] if layout is None else layout_units(path, format, layout)


def layout_units(path: str, format: str, layout: columns.Layout) -> list[Unit]:
    """The units of a file's layout: row groups and record batches by number, token files by document."""
    if file_kind(path, format)[0] not in TOKEN_KINDS:
        return [Unit(path, group, group + 1) for group in range(len(layout))]
    edges = [0, *itertools.accumulate(documents for documents, _ in layout)]
    return [Unit(path, start, stop) for start, stop in itertools.pairwise(edges)]


def column_layout(path: str, format: str = "auto") -> columns.Layout | None:
    """(records, bytes) of every row group, record batch or stretch of documents; None for formats that have none.

    Raises OSError or ValueError for a broken file.
    """
    kind, _ = file_kind(path, format)
    if kind not in LAYOUT_KINDS:
        return None
    with open_binary(path) as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        try:
            if kind in TOKEN_KINDS:
                layout = token_index.stretches(token_index.read_index(path, kind, size))
            else:
                layout = columns.parquet_layout(file) if kind == "parquet" else columns.arrow_layout(file)
        except (ValueError, MemoryError, LookupError, NotImplementedError, TypeError) as error:
            # pyarrow explains itself over several lines; the first ones say what is wrong.
            raise ValueError(" ".join(str(error).split())[:REASON_CHARACTERS] or type(error).__name__) from None
    # Chunks are cut by these numbers: a damaged one must not make a billion of them.
    most = size if kind in TOKEN_KINDS else BOMB_BYTES + MOST_EXPANSION * size
    return [(max(0, records), min(max(0, text), most)) for records, text in layout]
