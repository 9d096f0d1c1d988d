"""The files of a source with what tells an unchanged file from a changed one, many at a time."""

import glob
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from headrace.errors import ConfigError

THREADS = 16
"""Threads for looking at files. On a local disk one is as fast; what they are for is the millisecond that a network
file system or an object store takes to answer."""
BATCH = 256
"""Files a thread looks at in one go, so that handing out work costs nothing beside 2 µs a file."""


class File(NamedTuple):
    """A file as it was found."""

    path: str
    size: int
    """Bytes."""
    stamp: str
    """Modification time in nanoseconds; empty for a URL, whose store is asked only when it matters (`url_stamp`)."""


def local_files(pattern: str, known: Callable[[str], bool]) -> list[File]:
    """The files behind a path, folder or glob pattern; in folders only those that are `known` by their path.

    Raises ConfigError for what cannot be read or be named in the journal.
    """
    matches = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
    paths = [match for match in matches if not os.path.isdir(match)]
    for match in matches:
        if os.path.isdir(match):
            below = (os.path.join(folder, name) for folder, _, names in os.walk(match) for name in names)
            paths += [path for path in below if known(path)]
    batches = [paths[at : at + BATCH] for at in range(0, len(paths), BATCH)]
    with ThreadPoolExecutor(THREADS) as pool:
        return [file for files in pool.map(_stat, batches) for file in files]


def _stat(paths: list[str]) -> list[File]:
    files = []
    for path in paths:
        try:
            path.encode()
            state = os.stat(path)
        except UnicodeEncodeError:
            raise ConfigError(f"{path!r}: the name of the file is not UTF-8; rename it") from None
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not os.path.islink(path):
                continue  # removed since it was listed
            raise ConfigError(f"{path}: {error.strerror} (a link that leads nowhere?)") from None
        if stat.S_ISREG(state.st_mode):
            files.append(File(path, state.st_size, str(state.st_mtime_ns)))
    return files
