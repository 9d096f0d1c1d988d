"""Documents to files, named by the task alone.

datatrove's writers fill the file name from the documents' metadata, so that a record with a field `rank` would choose
where it is written; these do not look at it.
"""

from typing import Any

import pyarrow as pa
from datatrove.data import Document
from datatrove.pipeline.writers import JsonlWriter, ParquetWriter

from data_scheduler.prep.config import FieldType

ARROW_TYPES: dict[FieldType, pa.DataType] = {
    "text": pa.string(),
    "integer": pa.int64(),
    "number": pa.float64(),
    "boolean": pa.bool_(),
}
ROWS = 1000
"""Documents in a row group: what one lane opens at a time, about 4 MB of web pages."""


class WorkWriter(JsonlWriter):
    """`<rank>.jsonl.zst` with all that a document has: between passes, and for removed documents."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder, output_filename="${rank}.jsonl.zst", compression="zstd")

    def _get_output_filename(self, document: Document, rank: int | str = 0, **kwargs: Any) -> str:
        return f"{rank:0>5}.jsonl.zst"


class OutputJsonl(JsonlWriter):
    """`<rank>.jsonl.zst` with the output's columns as fields."""

    def __init__(self, folder: str, columns: dict[str, FieldType]) -> None:
        super().__init__(folder, output_filename="${rank}.jsonl.zst", compression="zstd", adapter=_flat)
        self.columns = columns

    def _get_output_filename(self, document: Document, rank: int | str = 0, **kwargs: Any) -> str:
        return f"{rank:0>5}.jsonl.zst"


class OutputParquet(ParquetWriter):
    """`<rank>.parquet`, compressed by zstd."""

    def __init__(self, folder: str, columns: dict[str, FieldType]) -> None:
        fields = [("id", pa.string()), ("text", pa.string())]
        schema = pa.schema(fields + [(name, ARROW_TYPES[kind]) for name, kind in columns.items()])
        super().__init__(
            folder,
            output_filename="${rank}.parquet",
            compression="zstd",
            adapter=_flat,
            batch_size=ROWS,
            max_file_size=-1,
            schema=schema,
        )
        self.columns = columns

    def _get_output_filename(self, document: Document, rank: int | str = 0, **kwargs: Any) -> str:
        return f"{rank:0>5}.parquet"


def _flat(writer: OutputJsonl | OutputParquet, document: Document) -> dict[str, Any]:
    """A document as a row; datatrove binds this to its writer."""
    columns = {name: document.metadata.get(name) for name in writer.columns}
    return {"id": document.id, "text": document.text, **columns}
