"""The files of a source with what tells an unchanged file from a changed one, many at a time."""

import glob
import itertools
import os
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from headrace.errors import ConfigError

Item = TypeVar("Item")
Found = TypeVar("Found")

THREADS = 16
"""Threads for looking at files where that takes long: a network file system or an object store answers in a
millisecond."""
BATCH = 256
"""Files looked at in one go, so that handing out work costs nothing beside 5 µs a file."""
SLOW_S = 50e-6
"""Seconds a file from which threads pay; on a local disk they only double the CPU time."""


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
    return list(looked_at(_stat, paths))


def looked_at(look: Callable[[list[Item]], list[Found]], items: list[Item]) -> Iterator[Found]:
    """What `look` finds of batches of items, in order; with threads from where it turns out to be slow."""
    batches = [items[at : at + BATCH] for at in range(0, len(items), BATCH)]
    for number, batch in enumerate(batches):
        began = time.perf_counter()
        found = look(batch)
        is_slow = time.perf_counter() - began > SLOW_S * len(batch)
        yield from found
        if is_slow:
            with ThreadPoolExecutor(THREADS) as pool:
                yield from itertools.chain.from_iterable(pool.map(look, batches[number + 1 :]))
            return


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
