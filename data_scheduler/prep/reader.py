"""Raw files to datatrove documents, a file a task. What cannot be read is counted and named, never skipped silently."""

import io
from collections.abc import Iterator, Mapping
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet
from datatrove.data import Document
from datatrove.io import DataFolder
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.readers import JsonlReader

from data_scheduler.extract import lookup
from data_scheduler.formats.compression import CODECS, decompress
from data_scheduler.formats.lines import parse
from data_scheduler.paths import file_kind, open_binary
from data_scheduler.prep.config import FieldType, InputConfig

ROWS = 256
"""Rows of a parquet file that are in memory at a time."""
Row = Mapping[str, Any] | str
"""A record, or the reason why there is none."""


class CorpusReader(PipelineStep):
    """Reads file number `rank`; its rejects go to `rejects/<rank>.jsonl` in `folder`."""

    type = "read"
    name = "corpus"

    def __init__(self, files: list[str], config: InputConfig, folder: str) -> None:
        super().__init__()
        self.files, self.config = files, config
        self.folder = DataFolder(folder)

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        path = self.files[rank]
        with self.folder.open(f"rejects/{rank:05d}.jsonl", "wb") as rejects:
            for number, row in enumerate(_rows(path, self.config)):
                self.stat_update("records")
                document = row if isinstance(row, str) else self._document(row, path, number)
                if isinstance(document, str):
                    self.stat_update("rejected")
                    line = {"file": path, "record": number, "reason": document}
                    rejects.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
                else:
                    yield document

    def _document(self, row: Mapping[str, Any], path: str, number: int) -> Document | str:
        """The document of a record, or the reason why it gives none."""
        text = lookup(row, self.config.text_key)
        if not isinstance(text, str):
            return f"field {self.config.text_key!r} is " + ("missing" if text is None else "not text")
        if not text.strip():
            return f"field {self.config.text_key!r} is empty"
        name = lookup(row, self.config.id_key) if self.config.id_key else None
        if name is not None and (not isinstance(name, str | int) or isinstance(name, bool)):
            return f"field {self.config.id_key!r} is neither text nor an integer"
        kept = {}
        for key, kind in self.config.keep.items():
            value = lookup(row, key)
            if value is not None and not _fits(value, kind):
                return f"field {key!r} is not {_ARTICLE[kind]}"
            kept[key] = float(value) if kind == "number" and value is not None else value
        return Document(text=text, id=f"{path}/{number}" if name is None else str(name), metadata=kept)


class WorkReader(JsonlReader):
    """Reads what `WorkWriter` wrote for the same rank: nothing when no document was left."""

    name = "work"

    def __init__(self, folder: str) -> None:
        super().__init__(folder, compression="zstd", add_file_path=False)

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        name = f"{rank:05d}.jsonl.zst"
        if self.data_folder.isfile(name):
            yield from self.read_files_shard([name])


def _rows(path: str, config: InputConfig) -> Iterator[Row]:
    """The records of a file, in order."""
    kind, suffix = file_kind(path, config.format)
    try:
        if kind == "parquet":
            yield from _parquet_rows(path, config)
            return
        with open_binary(path) as file:
            data, problem = decompress(file, CODECS[suffix] if suffix else None)
    except (OSError, pa.ArrowException) as error:
        yield f"cannot be read: {str(error).splitlines()[0]}"
        return
    if kind == "text":
        try:
            yield {config.text_key: data.decode()} if problem is None else problem
        except UnicodeDecodeError:
            yield "text is not valid UTF-8"
        return
    # The last line of a damaged file is not whole.
    for line in io.BytesIO(data if problem is None else data[: data.rfind(b"\n") + 1]):
        if not line.isspace():
            yield parse(line)
    if problem is not None:
        yield problem


def _parquet_rows(path: str, config: InputConfig) -> Iterator[Row]:
    with open_binary(path) as file:
        table = pyarrow.parquet.ParquetFile(file)
        wanted = {config.text_key, *config.keep} | ({config.id_key} if config.id_key else set())
        names = {name for key in wanted for name in (key, key.split(".")[0])}
        columns = [name for name in table.schema_arrow.names if name in names]
        for batch in table.iter_batches(batch_size=ROWS, columns=columns, use_threads=False):
            try:
                yield from batch.to_pylist()
            except UnicodeDecodeError:
                yield from (_one_row(batch, at) for at in range(len(batch)))


def _one_row(batch: pa.RecordBatch, at: int) -> Row:
    try:
        row: Row = batch.slice(at, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return "a field is not valid UTF-8"
    return row


_ARTICLE = {"text": "text", "integer": "an integer", "number": "a number", "boolean": "true or false"}


def _fits(value: Any, kind: FieldType) -> bool:
    if kind == "boolean" or isinstance(value, bool):
        return kind == "boolean" and isinstance(value, bool)
    if kind == "integer":
        return isinstance(value, int) and -(2**63) <= value < 2**63
    return isinstance(value, str if kind == "text" else int | float)
