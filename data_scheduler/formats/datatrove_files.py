"""Whatever datatrove's readers read: WARC files of Common Crawl, and its readers of jsonl, csv, parquet and ipc files.

datatrove leaves out what it cannot use, with a warning in its log or without one. Here nothing is lost silently, so an
*adapter* (datatrove's own hook between a raw record and a document) sees every record with its number. A warning is a
reject. A gap in the numbers of a WARC file is a record that is no page (a request, a picture), and counts as filtered.
"""

import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import orjson

from data_scheduler.extract import Extractor
from data_scheduler.formats.compression import Codec, Damage, decoded
from data_scheduler.formats.records import Records
from headrace.errors import ConfigError, HeadraceError

READERS = {
    "warc": "WarcReader", "jsonl": "JsonlReader", "csv": "CSVReader", "parquet": "ParquetReader", "ipc": "IpcReader",
}  # fmt: skip
PACKAGES = {"cchardet": "faust-cchardet", "magic": "python-magic"}
"""Packages whose modules have other names."""

WARC = b"WARC/"
WARC_END = b"\r\n\r\n"
"""What every record of a WARC file ends with; a file that does not was cut off."""
READ_BYTES = 1 << 20

Row = dict[str, Any] | str | None
"""A record's fields, the reason why it has none, or None where it is no page."""


class _Stream(io.RawIOBase):
    """A file's decoded bytes. Damage is raised when all before it was read, so the record it fell into is not given."""

    def __init__(self, file: IO[bytes], codec: Codec | None) -> None:
        super().__init__()
        self._pieces = iter(lambda: file.read(READ_BYTES), b"") if codec is None else decoded(file, codec)
        self._rest = memoryview(b"")
        self._begin = self._end = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            piece = next(self._pieces, b"")
            if not piece and self._begin == WARC and self._end != WARC_END:
                raise Damage("cut off; the records up to there were read")
            self._begin = (self._begin + piece[: len(WARC)])[: len(WARC)]
            self._end = (self._end + piece[-len(WARC_END) :])[-len(WARC_END) :]
            self._rest = memoryview(piece)
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


def read(name: str, file: IO[bytes], codec: Codec | None, extractor: Extractor) -> Records:
    """Every record of a file that is open as `file`. Raises ConfigError when a package is missing."""
    rows: list[Row] = []
    problem = None
    try:
        _collect(name, file if name in ("parquet", "ipc") else _Stream(file, codec), rows)
    except ImportError as error:
        package = (error.name or str(error)).partition(".")[0]
        raise ConfigError(
            f"source {extractor.name!r}: datatrove:{name} needs {PACKAGES.get(package, package)}: "
            "pip install 'headrace[prep]'"
        ) from None
    except HeadraceError:
        raise
    except Damage as damage:
        problem = str(damage)
    except Exception as error:  # whatever the libraries below a reader raise
        told = " ".join(str(error).split()) or type(error).__name__
        problem = f"not readable ({told}); the records up to it were read"
    records = Records()
    for row in rows:
        if isinstance(row, dict):
            records.size += sum(len(value) for value in row.values() if isinstance(value, str))
    extractor.add(rows, records)
    if problem is not None:
        records.reject(problem)
    return records


def _collect(name: str, file: Any, rows: list[Row]) -> None:
    """Fill `rows` with the records of a file. Raises ImportError, and what datatrove and the libraries below raise."""
    from datatrove.io import DataFolder
    from datatrove.pipeline import readers

    met = 0

    def adapter(_: Any, data: dict[str, Any], __: str, number: int) -> dict[str, Any]:
        nonlocal met
        if name == "warc":
            rows.extend([None] * (number - met))
        met = number + 1
        rows.append(_fields(data))
        # With a text of its own every record becomes a document; those are not looked at.
        return {"text": "-", "id": "-", "metadata": {}}

    folder = DataFolder("/", fs=_one_file(file), auto_mkdir=False)
    reader = getattr(readers, READERS[name])(folder, adapter=adapter)
    with _warnings(rows.append):
        # Named without a suffix: what is compressed is decoded here.
        for _ in reader.read_file("file"):
            pass


def _fields(data: dict[str, Any]) -> dict[str, Any]:
    """A record's fields; those of its `metadata`, which may be JSON, can be named directly too, as in datatrove."""
    metadata = data.get("metadata")
    if isinstance(metadata, str):
        try:
            metadata = orjson.loads(metadata)
        except orjson.JSONDecodeError:
            metadata = None
    return (metadata | data) if isinstance(metadata, dict) else data


def _one_file(file: Any) -> Any:
    """A file system whose only file is open already: what this package's own reading of stores gives."""
    from fsspec.spec import AbstractFileSystem

    class OneFile(AbstractFileSystem):  # type: ignore[misc]
        cachable = False

        def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
            return file

    return OneFile()


@contextmanager
def _warnings(take: Callable[[str], Any]) -> Iterator[None]:
    """Give `take` every warning that datatrove logs in this thread."""
    from loguru import logger

    thread = threading.get_ident()

    def mine(record: Any) -> bool:
        return bool(record["thread"].id == thread and record["name"].startswith("datatrove"))

    def sink(message: Any) -> None:
        take(" ".join(message.record["message"].split()))

    handle = logger.add(sink, level="WARNING", filter=mine)
    try:
        yield
    finally:
        logger.remove(handle)
