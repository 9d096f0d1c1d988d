"""A large row group in parts that can be read alone: each an Arrow stream of the columns a source needs."""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from data_scheduler.extract import Extractor
from data_scheduler.formats import columns
from data_scheduler.formats.records import Records, Unit
from data_scheduler.paths import open_binary

BATCH_ROWS = 1024
"""Rows decoded at a time: 4 MB at 4 KB a document."""
BUFFER_BYTES = 1 << 20


def pack(unit: Unit, kind: str, wanted: list[str], lengths: Sequence[int]) -> Iterator[bytes]:
    """A row group (`kind` parquet) or record batch (arrow) as parts of `lengths` rows, read once from front to back.

    In memory for one part of a parquet file, and for the whole batch of an Arrow file. Raises OSError, ValueError or
    pa.ArrowException when the unit or a wanted column cannot be read, or holds fewer rows than its file says.
    """
    with open_binary(unit.path) as file:
        batches = _parquet(file, unit, wanted) if kind == "parquet" else _arrow(file, unit, wanted)
        table: Any = None
        for length in lengths:
            while table is None or table.num_rows < length:
                batch = next(batches, None)
                if batch is None:
                    raise ValueError("it holds fewer rows than its file says")
                more = pa.Table.from_batches([batch])
                table = more if table is None else pa.concat_tables([table, more])
            sink = pa.BufferOutputStream()
            with pyarrow.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table.slice(0, length))
            yield sink.getvalue().to_pybytes()
            table = table.slice(length)


def read(data: bytes, unit: Unit, extractor: Extractor) -> Records:
    """The rows of a part."""
    return columns.from_table(pyarrow.ipc.open_stream(data).read_all(), unit, extractor)


def _parquet(file: Any, unit: Unit, wanted: list[str]) -> Iterator[Any]:
    parquet = pyarrow.parquet.ParquetFile(file, buffer_size=BUFFER_BYTES)
    _check(parquet.schema_arrow.names, wanted)
    groups = list(range(unit.start, unit.stop))
    yield from parquet.iter_batches(BATCH_ROWS, row_groups=groups, columns=wanted, use_threads=False)


def _arrow(file: Any, unit: Unit, wanted: list[str]) -> Iterator[Any]:
    reader = pyarrow.ipc.open_file(file)
    _check(reader.schema.names, wanted)
    for index in range(unit.start, unit.stop):
        yield reader.get_batch(index).select(wanted)


def _check(names: list[str], wanted: list[str]) -> None:
    missing = set(wanted) - set(names)
    if missing:
        raise ValueError(f"no column {min(missing)!r}")
