"""Column formats through pyarrow: parquet by row groups, Arrow files (feather) by record batches, CSV whole."""

import io
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.ipc
import pyarrow.parquet

from data_scheduler.extract import Extractor
from data_scheduler.formats.compression import Codec, decompress
from data_scheduler.formats.records import Records, Unit
from data_scheduler.paths import open_binary

Layout = list[tuple[int, int]]
"""(rows, bytes of text) of every row group or record batch."""


def parquet_layout(path: str) -> Layout:
    """Raises OSError or pa.ArrowInvalid for a broken file."""
    with open_binary(path) as file:
        metadata = pyarrow.parquet.ParquetFile(file).metadata
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        return [(int(group.num_rows), int(group.total_byte_size)) for group in groups]


def arrow_layout(path: str) -> Layout:
    """Raises OSError or pa.ArrowInvalid for a broken file."""
    with open_binary(path) as file:
        reader = pyarrow.ipc.open_file(file)
        batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        return [(batch.num_rows, batch.nbytes) for batch in batches]


def read_parquet(unit: Unit, extractor: Extractor) -> Records:
    """The rows of the unit's row groups."""
    return _read(unit, extractor, _parquet_table)


def read_arrow(unit: Unit, extractor: Extractor) -> Records:
    """The rows of the unit's record batches."""
    return _read(unit, extractor, _arrow_table)


def read_csv(unit: Unit, codec: Codec | None, extractor: Extractor) -> Records:
    """The rows of a CSV file with a header line; all columns but numbers are text."""
    problem = None

    def table(unit: Unit, columns: list[str]) -> pa.Table:
        nonlocal problem
        with open_binary(unit.path) as file:
            data = file.read()
        if codec is not None:
            data, problem = decompress(data, codec)
            if problem is not None:  # the row the damage fell into is not whole
                data = data[: data.rfind(b"\n") + 1]
        # Quoted fields may hold newlines: documents do.
        options = pyarrow.csv.ParseOptions(newlines_in_values=True)
        read_options = pyarrow.csv.ReadOptions(block_size=max(len(data), 1), use_threads=False)
        return pyarrow.csv.read_csv(io.BytesIO(data), read_options=read_options, parse_options=options)

    records = _read(unit, extractor, table)
    if problem is not None:
        records.reject(problem)
    return records


def from_table(table: pa.Table, unit: Unit, extractor: Extractor) -> Records:
    """The rows of a table that was read from the unit before."""
    return _read(unit, extractor, lambda unit, columns: table)


def _read(unit: Unit, extractor: Extractor, load: Any) -> Records:
    records = Records()
    try:
        table: pa.Table = load(unit, extractor.columns)
        names: list[str] = table.schema.names  # decoded here: a damaged file can have names that are not text
    except (pa.ArrowException, UnicodeDecodeError) as error:
        records.reject(f"not readable: {str(error).splitlines()[0]}")
        return records
    missing = [column for column in extractor.columns if column not in names]
    if missing:
        records.reject(f"no column {missing[0]!r} (columns: {', '.join(names)})")
        return records
    if extractor.is_plain:
        _add_plain(table.column(extractor.text_key), extractor.text_key, records)
    else:
        records.size = table.nbytes
        extractor.add(table.select(extractor.columns).to_pylist(), records)
    return records


def _parquet_table(unit: Unit, columns: list[str]) -> pa.Table:
    with open_binary(unit.path) as file:
        table = pyarrow.parquet.ParquetFile(file)
        names = table.schema_arrow.names
        wanted = columns if set(columns) <= set(names) else names
        return table.read_row_groups(range(unit.start, unit.stop), columns=wanted, use_threads=False)


def _arrow_table(unit: Unit, columns: list[str]) -> pa.Table:
    with open_binary(unit.path) as file:
        reader = pyarrow.ipc.open_file(file)
        return pa.Table.from_batches([reader.get_batch(index) for index in range(unit.start, unit.stop)])


def _add_plain(column: Any, name: str, records: Records) -> None:
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        records.reject(f"column {name!r} holds {kind}, not text")
        return
    records.size = column.nbytes
    try:
        texts = column.to_pylist()
    except UnicodeDecodeError:
        texts = [_decoded(value) for value in column]
    for text in texts:
        if isinstance(text, str):
            records.documents.append(text)
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
