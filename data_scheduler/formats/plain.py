"""Plain text: a file is one document."""

from data_scheduler.formats.compression import Codec, decompress
from data_scheduler.formats.records import Records
from data_scheduler.paths import open_binary


def read(path: str, codec: Codec | None) -> Records:
    """The file's text as the only record; raises OSError when it cannot be opened."""
    records = Records()
    with open_binary(path) as file:
        data, problem = file.read(), None
    if codec is not None:
        data, problem = decompress(data, codec)
    records.size = len(data)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        records.reject(f"not valid UTF-8 at byte {error.start}")
        return records
    if problem is not None:
        records.reject(problem)
    else:
        records.documents.append(text)
    return records
