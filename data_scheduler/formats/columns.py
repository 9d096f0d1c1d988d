"""Column formats through pyarrow: parquet by row groups, Arrow files by record batches.

An Arrow *file* (feather) says where its batches are; an Arrow *stream* (what `datasets` keeps on disk) is read from its
beginning up to the batches asked for.
"""

import io
from collections.abc import Callable
from typing import IO, Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from data_scheduler.extract import Extractor
from data_scheduler.formats.compression import BOMB_BYTES, MOST_EXPANSION
from data_scheduler.formats.records import Records, Unit

Layout = list[tuple[int, int]]
"""(rows, bytes of text) of every row group or record batch."""
ARROW_FILE = b"ARROW1"
BROKEN = (pa.ArrowException, ValueError, LookupError, MemoryError, OSError, NotImplementedError, StopIteration)
"""What pyarrow raises for damaged files; UnicodeDecodeError is a ValueError."""
THRIFT_BYTES = 64 << 20
"""Most bytes, and entries, of anything a parquet footer describes: a damaged length must not ask for gigabytes."""


def parquet_layout(file: IO[bytes]) -> Layout:
    """Raises OSError or pa.ArrowInvalid for a broken file."""
    metadata = open_parquet(file).metadata
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    return [(max(0, int(group.num_rows)), max(0, int(group.total_byte_size))) for group in groups]


def arrow_layout(file: IO[bytes]) -> Layout:
    """A damaged batch counts as one record without text: reading it gives one reject. Raises as `parquet_layout`."""
    batches = Batches(file)
    layout: Layout = []
    while batches.left:
        try:
            batch = batches.next()
        except BROKEN:
            layout.append((1, 0))
            continue
        if batch is not None:
            layout.append((batch.num_rows, batch.nbytes))
    return layout


def read_parquet(file: IO[bytes], unit: Unit, extractor: Extractor) -> Records:
    """The rows of the unit's row groups. Raises OSError."""

    def load() -> pa.Table:
        size = file.seek(0, io.SEEK_END)
        parquet = open_parquet(file)
        names = parquet.schema_arrow.names
        wanted = extractor.columns if set(extractor.columns) <= set(names) else names
        for index in range(unit.start, unit.stop):
            refuse_bomb(parquet.metadata.row_group(index), size)
        return parquet.read_row_groups(range(unit.start, unit.stop), columns=wanted, use_threads=False)

    return _read(load, extractor)


def read_arrow(file: IO[bytes], unit: Unit, extractor: Extractor) -> Records:
    """The rows of the unit's record batches. Raises OSError."""

    def load() -> pa.Table:
        batches = Batches(file)
        batches.skip(unit.start)
        found = [batches.next() for _ in range(unit.start, unit.stop)]
        if None in found:
            raise pa.ArrowInvalid("the stream has fewer batches than when the source entered the run")
        return pa.Table.from_batches(found)

    return _read(load, extractor)


def add_table(table: pa.Table, extractor: Extractor, records: Records) -> None:
    """Add every row of a table to `records`."""
    try:
        names: list[str] = table.schema.names  # decoded here: a damaged file can have names that are not text
    except UnicodeDecodeError as error:
        records.reject(f"not readable: {error}")
        return
    missing = [column for column in extractor.columns if column not in names]
    if missing:
        records.reject(f"no column {missing[0]!r} (columns: {', '.join(names[:20])})")
        return
    twice = [column for column in extractor.columns if names.count(column) > 1]
    if twice:
        records.reject(f"column {twice[0]!r} is there {names.count(twice[0])} times")
        return
    if extractor.is_plain:
        _add_plain(table.column(extractor.text_key), extractor, records)
        return
    records.size += table.nbytes
    wanted = table.select(extractor.columns)
    try:
        rows = wanted.to_pylist()
    except (UnicodeDecodeError, ValueError, OverflowError):  # dates that Python has no word for are ValueErrors
        rows = [_row(wanted, number) for number in range(wanted.num_rows)]
    extractor.add(rows, records)


def _read(load: Callable[[], pa.Table], extractor: Extractor) -> Records:
    records = Records()
    try:
        table = checked(load())
    except BROKEN as error:
        records.reject(f"not readable: {str(error) or type(error).__name__}")
        return records
    add_table(table, extractor, records)
    return records


def checked(table: Any) -> Any:
    """The table or batch, safe to read. Raises ArrowInvalid where a value could lie outside its buffer: Arrow itself
    checks nothing, and reading such a value, or even asking for `nbytes`, ends the process.

    Text that is not UTF-8 is let through in plain columns, whose offsets are checked first: values are rejected alone.
    """
    table.validate()
    for column in table.columns:
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            if "UTF8" not in str(error) or not _is_text(column.type):
                raise
    return table


def _is_text(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def open_parquet(file: IO[bytes]) -> Any:
    """Raises OSError or pa.ArrowInvalid."""
    return pyarrow.parquet.ParquetFile(
        file,
        thrift_string_size_limit=THRIFT_BYTES,
        thrift_container_size_limit=THRIFT_BYTES,
        page_checksum_verification=True,
    )


def refuse_bomb(group: Any, size: int) -> None:
    """Raise ArrowInvalid for a row group that claims far more text than its file of `size` bytes can hold.

    Only the group's own numbers are asked for: where the footer is damaged, `group.column(i)` ends the process.
    """
    if group.total_byte_size > max(BOMB_BYTES, MOST_EXPANSION * size):
        raise pa.ArrowInvalid(f"a row group that expands more than {MOST_EXPANSION} times, which text does not")


class Batches:
    """The record batches of an Arrow file or stream, one after the other."""

    def __init__(self, file: IO[bytes]) -> None:
        """Raises OSError or pa.ArrowInvalid."""
        file.seek(0)
        is_file = file.read(len(ARROW_FILE)) == ARROW_FILE
        file.seek(0)
        self._file = pyarrow.ipc.open_file(file) if is_file else None
        self._stream: Any = None if is_file else pyarrow.ipc.open_stream(file)
        self._count = self._file.num_record_batches if self._file else None
        self._at = 0
        self.left = self._count != 0
        """Whether there may be another batch."""

    def skip(self, count: int) -> None:
        """Go past batches; those of a stream have to be read for that."""
        if self._file is None:
            for _ in range(count):
                self._stream.read_next_batch()
        self._at += count

    def next(self) -> Any:
        """The next batch, checked; None at the end of a stream. Raises one of BROKEN where it is damaged."""
        if self._file is not None:
            self._at += 1
            self.left = self._at < (self._count or 0)
            return checked(self._file.get_batch(self._at - 1))
        try:
            batch = self._stream.read_next_batch()
        except StopIteration:
            self.left = False
            return None
        except BROKEN:
            self.left = False  # nothing says where the next one begins
            raise
        return checked(batch)


def _add_plain(column: Any, extractor: Extractor, records: Records) -> None:
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if not _is_text(kind):
        records.reject(f"column {extractor.text_key!r} holds {kind}, not text")
        return
    records.size += column.nbytes
    try:
        texts = column.to_pylist()
    except UnicodeDecodeError:
        texts = [_decoded(value) for value in column]
    for text in texts:
        if isinstance(text, str):
            extractor.add_document(text, records)
        else:
            records.reject("no text (null)" if text is None else "text is not valid UTF-8")


def _decoded(value: Any) -> str | bytes | None:
    if not value.is_valid:
        return None
    data: bytes = value.as_buffer().to_pybytes()
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _row(table: pa.Table, number: int) -> dict[str, Any] | str:
    """One row, or the reason why Python cannot hold it."""
    try:
        row: dict[str, Any] = table.slice(number, 1).to_pylist()[0]
        return row
    except UnicodeDecodeError:
        return "text is not valid UTF-8"
    except (ValueError, OverflowError) as error:
        return f"a value cannot be read: {error}"
