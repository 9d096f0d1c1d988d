"""A large row group in parts that can be read alone: each an Arrow stream of the columns a source needs."""

from collections.abc import Iterator, Sequence
from typing import IO, Any

import pyarrow as pa
import pyarrow.ipc

from data_scheduler.extract import Extractor
from data_scheduler.formats import columns
from data_scheduler.formats.records import Records, Unit

BATCH_ROWS = 1024
"""Rows decoded at a time: 4 MB at 4 KB a document."""


def pack(file: IO[bytes], unit: Unit, kind: str, wanted: list[str], lengths: Sequence[int]) -> Iterator[bytes]:
    """A row group (`kind` parquet) or record batch (arrow) as parts of `lengths` rows, read once from front to back.

    In memory for one part of a parquet file, and for the whole batch of an Arrow file. Raises OSError, ValueError or
    pa.ArrowException when the unit or a wanted column cannot be read, or holds fewer rows than its file says.
    """
    batches = _parquet(file, unit, wanted) if kind == "parquet" else _arrow(file, unit, wanted)
    table: Any = None
    for length in lengths:
        while table is None or table.num_rows < length:
            batch = next(batches, None)
            if batch is None:
                raise ValueError("it holds fewer rows than its file says")
            more = pa.Table.from_batches([batch])
            columns.check(more)
            table = more if table is None else pa.concat_tables([table, more])
        sink = pa.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table.slice(0, length))
        yield sink.getvalue().to_pybytes()
        table = table.slice(length)


def read(data: bytes, extractor: Extractor) -> Records:
    """The rows of a part."""
    records = Records()
    columns.add_table(pyarrow.ipc.open_stream(data).read_all(), extractor, records)
    return records


def _parquet(file: IO[bytes], unit: Unit, wanted: list[str]) -> Iterator[Any]:
    parquet = columns.open_parquet(file)
    _find(parquet.schema_arrow.names, wanted)
    groups = list(range(unit.start, unit.stop))
    for group in groups:
        columns.refuse_bomb(parquet.metadata.row_group(group))
    yield from parquet.iter_batches(BATCH_ROWS, row_groups=groups, columns=wanted, use_threads=False)


def _arrow(file: IO[bytes], unit: Unit, wanted: list[str]) -> Iterator[Any]:
    for batch in columns.batches(file, unit.start, unit.stop):
        _find(batch.schema.names, wanted)
        yield batch.select(wanted)


def _find(names: list[str], wanted: list[str]) -> None:
    for name in wanted:
        if names.count(name) != 1:
            raise ValueError(f"column {name!r} is there {names.count(name)} times")
