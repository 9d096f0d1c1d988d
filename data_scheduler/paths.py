"""From the paths of a source to a sorted list of files with sizes; local paths and fsspec URLs alike."""

import glob
import os
from typing import IO, cast

from data_scheduler.listing import File, local_files, stamped
from headrace.errors import ConfigError

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
}
UNCOMPRESSED = ("parquet", "arrow", "npy", "megatron")
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


def expand(patterns: list[str], owner: str) -> list[tuple[str, int]]:
    """Every file behind `patterns` with its size in bytes; see `list_files`."""
    return [(file.path, file.size) for file in list_files(patterns, owner)]


def list_files(patterns: list[str], owner: str) -> list[File]:
    """Every file behind `patterns`, sorted by path, each once.

    A folder stands for the files of known format below it. Raises ConfigError naming `owner` when a pattern matches
    nothing.
    """
    found: dict[str, File] = {}
    for pattern in patterns:
        files = stamped(_expand_url(pattern)) if is_url(pattern) else local_files(pattern, _is_known)
        if not files:
            raise ConfigError(f"{owner}: no file at {pattern}")
        found.update((file.path, file) for file in files)
    return [found[path] for path in sorted(found)]


def _expand_url(pattern: str) -> dict[str, int]:
    import fsspec

    system, path = fsspec.core.url_to_fs(pattern)
    if glob.has_magic(path):
        infos = system.glob(path, detail=True)
    elif system.isdir(path):
        infos = {name: info for name, info in system.find(path, detail=True).items() if _is_known(name)}
    else:
        infos = {path: system.info(path)} if system.exists(path) else {}
    unsized = [name for name, info in infos.items() if info.get("size") is None]
    if unsized:
        raise ConfigError(f"{unsized[0]}: the server does not say how large the file is; copy it to a store that does")
    return {system.unstrip_protocol(name): int(info["size"]) for name, info in infos.items()}


def _is_known(path: str) -> bool:
    try:
        file_kind(path)
    except ConfigError:
        return False
    return not os.path.basename(path).startswith(".")


def open_binary(path: str) -> IO[bytes]:
    """Open a local file or URL for reading bytes, with seek."""
    if not is_url(path):
        return open(path, "rb")
    import fsspec

    return cast("IO[bytes]", fsspec.open(path, "rb").open())
