"""A large row group in parts that can be read alone: each an Arrow stream of the columns a source needs."""

import io
from collections.abc import Iterator, Sequence
from typing import IO, Any

import pyarrow as pa
import pyarrow.ipc

from data_scheduler.extract import Extractor
from data_scheduler.formats import columns
from data_scheduler.formats.records import Records, Unit

BATCH_ROWS = 1024
"""Rows decoded at a time: 4 MB at 4 KB a document."""


def pack(file: IO[bytes], unit: Unit, kind: str, extractor: Extractor, lengths: Sequence[int]) -> Iterator[bytes]:
    """A row group (`kind` parquet) or record batch (arrow) as parts of `lengths` rows, read once from front to back.

    In memory for one part of a parquet file, and for the whole batch of an Arrow file. Raises one of
    columns.BROKEN when the unit cannot be read, would be rejected as a whole, or has fewer rows than its file says.
    """
    wanted = extractor.columns
    batches = _parquet(file, unit, wanted) if kind == "parquet" else _arrow(file, unit, wanted)
    table: Any = None
    for length in lengths:
        while table is None or table.num_rows < length:
            batch = next(batches, None)
            if batch is None:
                raise ValueError("it holds fewer rows than its file says")
            more = pa.Table.from_batches([columns.checked(batch)])
            if table is None:
                _refuse_useless(more, extractor)
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
    size = file.seek(0, io.SEEK_END)
    for group in groups:
        columns.refuse_bomb(parquet.metadata.row_group(group), size)
    yield from parquet.iter_batches(BATCH_ROWS, row_groups=groups, columns=wanted, use_threads=False)


def _arrow(file: IO[bytes], unit: Unit, wanted: list[str]) -> Iterator[Any]:
    batches = columns.Batches(file)
    batches.skip(unit.start)
    for _ in range(unit.start, unit.stop):
        batch = batches.next()
        if batch is None:
            return
        _find(batch.schema.names, wanted)
        yield batch.select(wanted)


def _find(names: list[str], wanted: list[str]) -> None:
    for name in wanted:
        if names.count(name) != 1:
            raise ValueError(f"column {name!r} is there {names.count(name)} times")


def _refuse_useless(table: Any, extractor: Extractor) -> None:
    """Raise ValueError when something is wrong with the columns: one reject of the unit, not one of each part."""
    none = Records()
    columns.add_table(table.slice(0, 0), extractor, none)
    if none.rejects:
        raise ValueError(none.rejects[0].reason)
