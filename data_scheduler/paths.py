"""From the paths of a source to a sorted list of files with sizes; local paths and fsspec URLs alike."""

import os
from typing import IO

from data_scheduler.listing import File, local_files
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
    # As `_suffixes`, in an eighth of its time; every file of a source of a million is looked at when a run starts.
    dot = path.rfind(".")
    suffix, compression = path[dot:], None
    if suffix in COMPRESSIONS:
        compression, end, dot = suffix, dot, path.rfind(".", 0, dot)
        suffix = path[dot:end]
    if dot <= 0 or path[dot - 1] in "./" or "/" in suffix or "?" in path:
        suffix, compression = _suffixes(path)
    kind = FORMATS.get(suffix) if wanted == "auto" else wanted
    if compression and kind in UNCOMPRESSED:
        raise ConfigError(f"{path}: {kind} files are read in place; decompress it once with a tool of your choice")
    if kind is None:
        raise ConfigError(
            f"{path}: cannot tell the format from the name; known are {', '.join(sorted(FORMATS))}, also with "
            f"{' or '.join(COMPRESSIONS)} (or set the source's `format`)"
        )
    return kind, compression


def _suffixes(path: str) -> tuple[str, str | None]:
    """(suffix of the format, of the compression) of any name: with a URL's query, or beginning with dots."""
    stem, suffix = os.path.splitext(path.split("?", 1)[0])
    if suffix in COMPRESSIONS:
        return os.path.splitext(stem)[1], suffix
    return suffix, None


def expand(patterns: list[str], owner: str, wanted: str = "auto") -> list[tuple[str, int]]:
    """Every file behind `patterns` with its size in bytes; see `list_files`."""
    return [(file.path, file.size) for file in list_files(patterns, owner, wanted)]


def list_files(patterns: list[str], owner: str, wanted: str = "auto") -> list[File]:
    """Every file behind `patterns`, sorted by path, each once.

    A folder stands for the files of known format below it (those of a datatrove reader where `wanted` names one).
    Raises ConfigError naming `owner` when a pattern matches nothing, UnreachableError when a store does not answer.
    """
    found: dict[str, File] = {}
    for pattern in patterns:
        if is_url(pattern):
            try:
                sizes = list_url(pattern, lambda name: _is_known(name, wanted))
            except (ConfigError, UnreachableError) as error:
                raise type(error)(f"{owner}: {error}") from None
            files = [File(url, size, "") for url, size in sizes.items()]
        else:
            files = local_files(pattern, lambda path: _is_known(path, wanted))
        if not files:
            raise ConfigError(f"{owner}: no file at {pattern}")
        found.update((file.path, file) for file in files)
    return [found[path] for path in sorted(found)]


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
