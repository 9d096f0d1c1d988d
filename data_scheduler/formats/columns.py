"""Column formats through pyarrow: parquet by row groups, Arrow files by record batches.

An Arrow *file* (feather) says where its batches are; an Arrow *stream* (what `datasets` keeps on disk) is read from its
beginning up to the batches asked for.
"""

from collections.abc import Callable, Iterator
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
THRIFT_BYTES = 64 << 20
"""Most bytes, and entries, of anything a parquet footer describes: a damaged length must not ask for gigabytes."""


def parquet_layout(file: IO[bytes]) -> Layout:
    """Raises OSError or pa.ArrowInvalid for a broken file."""
    metadata = open_parquet(file).metadata
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    return [(max(0, int(group.num_rows)), max(0, int(group.total_byte_size))) for group in groups]


def arrow_layout(file: IO[bytes]) -> Layout:
    """Raises OSError or pa.ArrowInvalid for a broken file."""
    return [(batch.num_rows, batch.nbytes) for batch in batches(file, 0, None)]


def read_parquet(file: IO[bytes], unit: Unit, extractor: Extractor) -> Records:
    """The rows of the unit's row groups. Raises OSError."""

    def load() -> pa.Table:
        parquet = open_parquet(file)
        names = parquet.schema_arrow.names
        wanted = extractor.columns if set(extractor.columns) <= set(names) else names
        for index in range(unit.start, unit.stop):
            refuse_bomb(parquet.metadata.row_group(index))
        return parquet.read_row_groups(range(unit.start, unit.stop), columns=wanted, use_threads=False)

    return _read(load, extractor)


def read_arrow(file: IO[bytes], unit: Unit, extractor: Extractor) -> Records:
    """The rows of the unit's record batches. Raises OSError."""
    return _read(lambda: pa.Table.from_batches(list(batches(file, unit.start, unit.stop))), extractor)


def add_table(table: pa.Table, extractor: Extractor, records: Records) -> None:
    """Add every row of a table to `records`."""
    try:
        names: list[str] = table.schema.names  # decoded here: a damaged file can have names that are not text
    except UnicodeDecodeError as error:
        records.reject(f"not readable: {error}")
        return
    missing = [column for column in extractor.columns if column not in names]
    if missing:
        records.reject(f"no column {missing[0]!r} (columns: {', '.join(names)})")
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
        table = load()
        # A damaged offset would send the reading of a value outside its buffer.
        table.validate(full=False)
        check(table)
    except (pa.ArrowException, UnicodeDecodeError, MemoryError, ValueError, IndexError, OSError) as error:
        records.reject(f"not readable: {(str(error) or type(error).__name__).splitlines()[0]}")
        return records
    add_table(table, extractor, records)
    return records


def check(table: pa.Table) -> None:
    """Arrow's full validation, except that text which is not UTF-8 is left to be rejected value by value."""
    try:
        table.validate(full=True)
    except pa.ArrowInvalid as error:
        if "UTF8" not in str(error):
            raise


def open_parquet(file: IO[bytes]) -> Any:
    """Raises OSError or pa.ArrowInvalid."""
    return pyarrow.parquet.ParquetFile(
        file,
        thrift_string_size_limit=THRIFT_BYTES,
        thrift_container_size_limit=THRIFT_BYTES,
        page_checksum_verification=True,
    )


def refuse_bomb(group: Any) -> None:
    """Raises pa.ArrowInvalid for a row group whose footer promises what text does not do."""
    columns = [group.column(index) for index in range(group.num_columns)]
    packed = sum(max(0, column.total_compressed_size) for column in columns)
    size = sum(max(0, column.total_uncompressed_size) for column in columns)
    if size > BOMB_BYTES and size > MOST_EXPANSION * packed:
        raise pa.ArrowInvalid(f"a row group that expands more than {MOST_EXPANSION} times, which text does not")


def batches(file: IO[bytes], start: int, stop: int | None) -> Iterator[Any]:
    """Record batches [start, stop) of an Arrow file or stream; None: all from `start` on."""
    file.seek(0)
    if file.read(len(ARROW_FILE)) == ARROW_FILE:
        file.seek(0)
        reader = pyarrow.ipc.open_file(file)
        for index in range(start, reader.num_record_batches if stop is None else stop):
            yield reader.get_batch(index)
        return
    file.seek(0)
    for index, batch in enumerate(pyarrow.ipc.open_stream(file)):
        if stop is not None and index >= stop:
            return
        if index >= start:
            yield batch


def _add_plain(column: Any, extractor: Extractor, records: Records) -> None:
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
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
