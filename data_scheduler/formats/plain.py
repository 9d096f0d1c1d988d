"""Plain text: a file is one document."""

from typing import IO

from data_scheduler.extract import Extractor
from data_scheduler.formats.compression import Codec, decompress
from data_scheduler.formats.lines import BOM
from data_scheduler.formats.records import Records


def read(file: IO[bytes], codec: Codec | None, extractor: Extractor) -> Records:
    """The file's text as the only record. Raises OSError."""
    records = Records()
    data, problem = decompress(file, codec, extractor.max_bytes)
    if problem is not None:
        records.reject(problem)
        return records
    if len(data) > extractor.max_bytes:
        records.reject(extractor.too_long(len(data)))
        return records
    records.size = len(data)
    try:
        text = data.removeprefix(BOM).decode()
    except UnicodeDecodeError as error:
        records.reject(f"not valid UTF-8 at byte {error.start}")
    else:
        extractor.add_bare(text, records)
    return records
