"""The folder of copies: large compressed files and row groups, cut into blocks that can be read alone.

    copies = CopyFolder(Path("~/.cache/headrace/copies").expanduser(), max_bytes=100 << 30)
    copy = copies.open("corpus.jsonl.zst …", lambda: cut(stream, 1 << 20), 7 << 30, "corpus.jsonl.zst")
    copy.blocks(3, 1800)                    # blocks 3, 1803, 3603, …; None instead of a copy: read the file itself

A copy is made once, by whichever process touches it first, and used by all: they wait for a lock, and the file appears
under its name whole or not at all. Without locks (some network file systems) two may make it; the results are equal and
the last one stays. The folder is kept under `max_bytes` by removing the copies used longest ago, none that is open.

Nothing here can change what is read: a copy that cannot be made, or does not verify, is left for the slow way.
"""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import shutil
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from data_scheduler.blocks import Block
from data_scheduler.copy_file import Copy, DamagedCopy, write_copy
from data_scheduler.progress import SHOWN_AFTER, Task

log = logging.getLogger("headrace.data")

OPEN_COPIES = 8
"""Copies a source keeps open; opening one costs reading its index, 0.2 ms for 2 GB of text."""
FREE_BYTES = 1 << 30
"""Left free on the disk, whatever `max_bytes` allows."""
STALE_S = 3600.0
"""A half copy that nobody has written to for so long was left by a process that died."""
SHARERS = 8
"""Processes that may fill the folder at once without passing its limit."""
EVICT_TO = 0.9
"""Share of the limit that is left when copies had to go, so that the next ones find room."""
TEXT_PER_BYTE = 2.5
"""Text behind a byte of a copy, estimated low: level 1 gives 2.6 on plain English, 5 on code."""


class NoRoom(Exception):
    """The copy does not fit into the folder's limit."""


class CopyFolder:
    """Copies under one folder. Not thread-safe; each source has its own object, and processes share the files."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self._open: OrderedDict[str, Copy] = OrderedDict()
        self._made: set[str] = set()
        self._discarded: set[str] = set()
        self._given_up: set[str] = set()
        self._usable = True
        self._allowance = 0
        """Bytes that may be written before the folder is looked at again."""

    def open(self, key: str, make: Callable[[], Iterator[Block]], text: int, what: str) -> Copy | None:
        """The copy called `key`, made with `make` from about `text` bytes when there is none; None: do without.

        `what` names it to people. Raises what `make` raises, save OSError.
        """
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        if name in self._given_up or not self._usable or self.max_bytes == 0:
            return None
        try:
            copy = self._existing(name, key, what) or self._make(name, key, make, text, what)
        except NoRoom as reason:
            self._given_up.add(name)
            _warn_once(
                f"{what}: no copy in {self.folder}: {reason}; it is read from its beginning for each chunk, which is "
                "slow. Raise data.cache_max_bytes"
            )
            return None
        except (OSError, DamagedCopy) as error:
            self._usable = False
            why = getattr(error, "strerror", None) or error
            _warn_once(
                f"data.cache_dir: {self.folder}: {why}; large compressed files are read from their "
                "beginning for each chunk, which is slow. Set data.cache_dir to a folder with space"
            )
            return None
        self._open[name] = copy
        while len(self._open) > OPEN_COPIES:
            self._open.popitem(last=False)[1].close()
        return copy

    def discard(self, copy: Copy, reason: str, what: str) -> None:
        """Remove a copy that was found damaged; the next `open` makes it again, but not a third time."""
        name = copy.path.stem
        self._open.pop(name, None)
        copy.close()
        if name in self._discarded:
            self._given_up.add(name)  # the disk loses what is written to it
        self._discarded.add(name)
        self._remove_damaged(copy.path, reason, what)

    def close(self) -> None:
        """Close every copy."""
        while self._open:
            self._open.popitem()[1].close()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.blocks"

    def _existing(self, name: str, key: str, what: str) -> Copy | None:
        path = self._path(name)
        try:
            copy = Copy(path, key)
        except FileNotFoundError:
            return None
        except DamagedCopy as damage:
            self._remove_damaged(path, str(damage), what)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # used now; what eviction goes by
        return copy

    def _remove_damaged(self, path: Path, reason: str, what: str) -> None:
        log.warning("%s: its copy %s is damaged (%s); removed", what, path, reason)
        self._made.discard(path.stem)
        path.unlink(missing_ok=True)

    def _make(self, name: str, key: str, make: Callable[[], Iterator[Block]], text: int, what: str) -> Copy:
        if name in self._made:
            raise NoRoom("it was made before and removed for others; the copies of this run do not fit together")
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / f"{name}.lock")
        with _held(lock, f"{what}: waiting for the process that copies it"):
            try:
                copy = self._existing(name, key, what)  # another process was faster
                if copy is None:
                    self._write(name, key, make, text, what)
                    copy = Copy(self._path(name), key)
                    self._made.add(name)
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(lock.lock_file)  # whoever waits for it makes another, and finds the copy
        return copy

    def _write(self, name: str, key: str, make: Callable[[], Iterator[Block]], text: int, what: str) -> None:
        needed = int(text / TEXT_PER_BYTE)
        self._make_room(needed)
        if shutil.disk_usage(self.folder).free < needed + FREE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        half = self.folder / f".{name}.{uuid.uuid4().hex}.half"
        try:
            with open(half, "wb") as file, Task(f"copying {what}, once", text, plain=True) as task:
                for size in write_copy(file, key, make()):
                    task.advance(size)
                    if file.tell() > self.max_bytes:
                        raise NoRoom(f"it alone is larger than data.cache_max_bytes = {self.max_bytes:,}")
                file.flush()
                os.fsync(file.fileno())
            self._publish(half, self._path(name))
        finally:
            half.unlink(missing_ok=True)

    def _publish(self, half: Path, path: Path) -> None:
        size = half.stat().st_size
        self._make_room(size)
        half.replace(path)
        self._allowance -= size
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _make_room(self, needed: int) -> None:
        """See to it that `needed` bytes fit. Raises NoRoom."""
        if needed > self.max_bytes:
            raise NoRoom(f"it needs about {needed:,} bytes, data.cache_max_bytes is {self.max_bytes:,}")
        if needed <= self._allowance:
            return
        with _held(FileLock(self.folder / "room.lock"), "waiting for the cache folder"):
            for half in self.folder.glob(".*.half"):
                with contextlib.suppress(FileNotFoundError):
                    if half.stat().st_mtime < time.time() - STALE_S:
                        half.unlink()
            left = self.max_bytes - self._evict(needed)
        # Looking at 100,000 copies takes a second, so it is done again only when a share of what is left has been used:
        # a share, because other processes use it too.
        self._allowance = max(needed, left // SHARERS)

    def _evict(self, needed: int) -> int:
        """Remove the copies used longest ago until `needed` bytes fit; the bytes of those that stay. Raises NoRoom."""
        held: list[tuple[float, int, Path]] = []
        for path in self.folder.glob("*.blocks"):
            with contextlib.suppress(FileNotFoundError):
                held.append(((found := path.stat()).st_mtime, found.st_size, path))
        total = sum(size for _, size, _ in held)
        if total + needed <= self.max_bytes:
            return total
        for _, size, path in sorted(held):
            if total + needed <= self.max_bytes * EVICT_TO:
                break
            if _remove_unused(path):
                total -= size
        if total + needed > self.max_bytes:
            raise NoRoom(f"all {total:,} bytes of copies are in use, data.cache_max_bytes is {self.max_bytes:,}")
        return total


def _remove_unused(path: Path) -> bool:
    """Remove a copy unless some process has it open."""
    try:
        file = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(file)
    return True


@contextlib.contextmanager
def _held(lock: FileLock, waiting: str) -> Iterator[None]:
    """Hold the lock; where the file system has none, go on without: it only saves work."""
    try:
        try:
            lock.acquire(timeout=SHOWN_AFTER)
        except Timeout:
            log.warning("%s", waiting)
            lock.acquire()
    except NotImplementedError:
        pass
    try:
        yield
    finally:
        lock.release()


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    """Every source has its own object here; one line for all of them is enough."""
    if message not in _warned:
        _warned.add(message)
        log.warning("%s", message)
