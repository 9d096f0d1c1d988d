"""CSV through pyarrow, read whole: a file with a header line, a document a row."""

import codecs
import io
from typing import IO, Any

import pyarrow as pa
import pyarrow.csv

from data_scheduler.extract import Extractor
from data_scheduler.formats.columns import add_table
from data_scheduler.formats.compression import Codec, decompress
from data_scheduler.formats.records import Records

BLOCK_BYTES = 1 << 30
"""Kinds of columns are guessed from the first block, so it is as large as pyarrow allows for (below 2 GiB)."""


MARK = "\ufdd0"
"""Stands for bytes that are not UTF-8: one of the characters that Unicode promises never to use."""
codecs.register_error("headrace.mark", lambda error: (MARK, error.end))  # type: ignore[attr-defined, unused-ignore]


def read(file: IO[bytes], codec: Codec | None, extractor: Extractor) -> Records:
    """The rows of a CSV file; columns of text are text whatever they look like. Raises OSError."""
    records = Records()
    data, problem = decompress(file, codec)
    if problem is not None:  # the row the damage fell into is not whole
        data = data[: data.rfind(b"\n") + 1]
    odd: list[str] = []

    def skip(row: Any) -> str:
        odd.append(f"{row.actual_columns} fields, not {row.expected_columns}")
        return "skip"

    # Quoted fields may hold newlines: documents do.
    parsing = pyarrow.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=skip)
    reading = pyarrow.csv.ReadOptions(block_size=min(max(len(data), 1), BLOCK_BYTES), use_threads=False)
    # A document of digits only is no number.
    converting = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(extractor.text_columns, pa.large_string()))
    try:
        data.decode()  # a check only, at 1 to 10 GB/s
    except UnicodeDecodeError:
        # pyarrow drops rows that are both invalid UTF-8 and of another length without a word.
        data = data.decode("utf-8", "headrace.mark").encode()
        extractor = extractor.refusing(MARK, "text is not valid UTF-8")
    if data:
        try:
            table = pyarrow.csv.read_csv(
                io.BytesIO(data), read_options=reading, parse_options=parsing, convert_options=converting
            )
        except (pa.ArrowException, UnicodeDecodeError) as error:
            records.reject(f"not readable: {str(error).splitlines()[0]}")
        else:
            add_table(table, extractor, records)
    for reason in odd:
        records.reject(reason)
    if problem is not None:
        records.reject(problem)
    return records
