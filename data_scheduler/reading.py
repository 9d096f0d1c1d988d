"""Raw bytes to documents: the door to the formats.

A *unit* is the smallest separately readable piece of a file: a byte range of an uncompressed line file, a row group of
a parquet file, a record batch of an Arrow file, a stretch of documents of a `.bin` file, or a whole file otherwise.
Nothing is dropped silently: records in = documents + rejects + records the source's filter left out.
"""

import itertools
from collections.abc import Callable, Iterator

from data_scheduler.config import SourceConfig
from data_scheduler.extract import Extractor
from data_scheduler.formats import columns, lines, plain, tokens
from data_scheduler.formats.compression import CODECS
from data_scheduler.formats.records import Records, Unit
from data_scheduler.paths import file_kind


class UnitReader:
    """Reads the units of one source."""

    def __init__(self, config: SourceConfig, eos_id: int = 0, vocab_size: int = 1 << 32) -> None:
        """`eos_id` and `vocab_size` are the tokenizer's; only files of token ids need them."""
        self.config = config
        self.extractor = Extractor(config)
        self._eos_id, self._vocab_size = eos_id, vocab_size

    def read(self, unit: Unit) -> Records:
        """All records of a unit. A file that cannot be opened or decoded at all gives one reject that says so."""
        try:
            return self._read(unit)
        except OSError as error:
            return unreadable(error)

    def _read(self, unit: Unit) -> Records:
        kind, suffix = file_kind(unit.path, self.config.format)
        codec = CODECS[suffix] if suffix else None
        if kind == "jsonl":
            return lines.read(unit, codec, self.extractor)
        if kind == "parquet":
            return columns.read_parquet(unit, self.extractor)
        if kind == "arrow":
            return columns.read_arrow(unit, self.extractor)
        if kind == "csv":
            return columns.read_csv(unit, codec, self.extractor)
        if kind == "npy":
            return tokens.read_npy(unit, self._eos_id, self._vocab_size)
        if kind == "megatron":
            return tokens.read_megatron(unit, self._eos_id, self._vocab_size)
        return plain.read(unit.path, codec)


def unreadable(error: OSError) -> Records:
    """What a unit that cannot be opened gives: one reject."""
    records = Records()
    records.reject(f"cannot be read: {error.strerror or error}")
    return records


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
    if file_kind(path, format)[0] != "megatron":
        return [Unit(path, group, group + 1) for group in range(len(layout))]
    edges = [0, *itertools.accumulate(documents for documents, _ in layout)]
    return [Unit(path, start, stop) for start, stop in itertools.pairwise(edges)]


LAYOUTS: dict[str, Callable[[str], columns.Layout]] = {
    "parquet": columns.parquet_layout,
    "arrow": columns.arrow_layout,
    "megatron": tokens.megatron_layout,
}
"""Formats whose files have parts of their own, and how to find them."""


def column_layout(path: str, format: str = "auto") -> columns.Layout | None:
    """(records, bytes) of every row group, record batch or stretch of documents; None for formats that have none."""
    kind, _ = file_kind(path, format)
    return LAYOUTS[kind](path) if kind in LAYOUTS else None
