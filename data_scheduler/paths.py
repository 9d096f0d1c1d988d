"""From the paths of a source to a sorted list of files with sizes; local paths and fsspec URLs alike."""

import glob
import os
from pathlib import Path
from typing import IO

from data_scheduler.remote import list_url, open_url
from headrace.errors import ConfigError, UnreachableError

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".csv": "csv",
    ".txt": "text",
    ".text": "text",
    ".npy": "npy",
    ".bin": "megatron",
    ".ds": "ds",
    ".warc": "datatrove:warc",
    ".wet": "datatrove:warc",
}
DATATROVE = "datatrove:"
"""What the formats that datatrove reads begin with; the name of its reader follows."""
READER_SUFFIXES = {
    "warc": (".warc", ".wet", ".arc"),
    "jsonl": (".jsonl", ".json", ".ndjson"),
    "csv": (".csv",),
    "parquet": (".parquet",),
    "ipc": (".arrow", ".feather", ".ipc"),
}
"""Which files of a folder a datatrove reader gets."""
UNCOMPRESSED = ("parquet", "arrow", "npy", "megatron", "ds")
"""Formats that are read in place; compressing the file as a whole would defeat them."""


def is_url(path: str) -> bool:
    """Whether fsspec, not the local file system, resolves this path."""
    return "://" in path


def file_kind(path: str, wanted: str = "auto") -> tuple[str, str | None]:
    """(format, suffix of its compression) of a file by its name; `wanted` overrides the format. Raises ConfigError."""
    stem, suffix = os.path.splitext(path.split("?", 1)[0])
    compression = suffix if suffix in COMPRESSIONS else None
    if compression:
        suffix = os.path.splitext(stem)[1]
    kind = FORMATS.get(suffix) if wanted == "auto" else wanted
    if compression and kind in UNCOMPRESSED:
        raise ConfigError(f"{path}: {kind} files are read in place; decompress it once with a tool of your choice")
    if kind is None:
        raise ConfigError(
            f"{path}: cannot tell the format from the name; known are {', '.join(sorted(FORMATS))}, also with "
            f"{' or '.join(COMPRESSIONS)} (or set the source's `format`)"
        )
    return kind, compression


def expand(patterns: list[str], owner: str, wanted: str = "auto") -> list[tuple[str, int]]:
    """Every file behind `patterns` with its size in bytes, sorted by path, each once.

    A folder stands for the files of known format below it (those of a datatrove reader where `wanted` names one).
    Raises ConfigError naming `owner` when a pattern matches nothing, UnreachableError when a store does not answer.
    """
    found: dict[str, int] = {}
    for pattern in patterns:
        if is_url(pattern):
            try:
                files = list_url(pattern, lambda name: _is_known(name, wanted))
            except (ConfigError, UnreachableError) as error:
                raise type(error)(f"{owner}: {error}") from None
        else:
            files = _expand_local(pattern, wanted)
        if not files:
            raise ConfigError(f"{owner}: no file at {pattern}")
        found.update(files)
    return sorted(found.items())


def _expand_local(pattern: str, wanted: str) -> dict[str, int]:
    matches = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
    files: dict[str, int] = {}
    for match in matches:
        if os.path.isdir(match):
            below = (str(path) for path in Path(match).rglob("*") if path.is_file())
            files.update({path: _local_size(path) for path in below if _is_known(path, wanted)})
        else:
            files[match] = _local_size(match)
    return files


def _local_size(path: str) -> int:
    """Bytes of a file. Raises ConfigError for what cannot be read or be named in the journal."""
    try:
        path.encode()
        return os.path.getsize(path)
    except UnicodeEncodeError:
        raise ConfigError(f"{path!r}: the name of the file is not UTF-8; rename it") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror} (a link that leads nowhere?)") from None


def _is_known(path: str, wanted: str = "auto") -> bool:
    """Whether a folder's file is taken: one of a known name, for a datatrove reader one that it reads."""
    name = os.path.basename(path)
    if name.startswith("."):
        return False
    if wanted.startswith(DATATROVE):
        stem, suffix = os.path.splitext(name)
        suffix = os.path.splitext(stem)[1] if suffix in COMPRESSIONS else suffix
        return suffix in READER_SUFFIXES[wanted.removeprefix(DATATROVE)]
    try:
        file_kind(path)
    except ConfigError:
        return False
    return True


def open_binary(path: str) -> IO[bytes]:
    """Open a local file or URL for reading bytes, with seek. Raises OSError; for URLs also what `open_url` raises."""
    return open_url(path) if is_url(path) else open(path, "rb")
