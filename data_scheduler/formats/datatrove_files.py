"""Whatever datatrove's readers read: WARC files of Common Crawl, and its readers of jsonl, csv, parquet and ipc files.

datatrove leaves out what it cannot use, with a warning in its log or without one. Here nothing is lost silently, so an
*adapter* (datatrove's own hook between a raw record and a document) sees every record with its number. A warning is a
reject. A gap in the numbers of a WARC file is a record that is no page (a request, a picture), and counts as filtered.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import orjson

from data_scheduler.extract import Extractor
from data_scheduler.formats.records import Records, Unit
from headrace.errors import ConfigError, HeadraceError

READERS = {
    "warc": "WarcReader", "jsonl": "JsonlReader", "csv": "CsvReader", "parquet": "ParquetReader", "ipc": "IpcReader",
}  # fmt: skip
PACKAGES = {"cchardet": "faust-cchardet", "magic": "python-magic"}
"""Packages whose modules have other names."""

Row = dict[str, Any] | str | None
"""A record's fields, the reason why it has none, or None where it is no page."""


def read(name: str, file: IO[bytes], unit: Unit, extractor: Extractor) -> Records:
    """Every record of a file that is open as `file`. Raises ConfigError when a package is missing."""
    rows: list[Row] = []
    problem = None
    try:
        _collect(name, file, unit.path, rows)
    except ImportError as error:
        package = (error.name or str(error)).partition(".")[0]
        raise ConfigError(
            f"source {extractor.name!r}: datatrove:{name} needs {PACKAGES.get(package, package)}: "
            "pip install 'headrace[prep]'"
        ) from None
    except HeadraceError:
        raise
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


def _collect(name: str, file: IO[bytes], path: str, rows: list[Row]) -> None:
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
        for _ in reader.read_file(path.replace("\\", "/").rpartition("/")[2]):
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


def _one_file(file: IO[bytes]) -> Any:
    """A file system whose only file is open already: what this package's own reading of stores gives."""
    from fsspec.spec import AbstractFileSystem

    class OneFile(AbstractFileSystem):  # type: ignore[misc]
        cachable = False

        def _open(self, path: str, mode: str = "rb", **_: Any) -> IO[bytes]:
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
