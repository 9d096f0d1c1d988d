"""How the files of a run folder are opened: they may be anybody's.

    with open_plain(run / "metrics.jsonl") as file: …       # OSError for whatever is no regular file of this folder

A run folder can be put into a shared folder by people who may not read all that the dashboard's user may, so neither
a file nor the folder it is in may be a link. A named pipe would block whoever opens it, and `/dev/zero` has no end.
"""

import errno
import io
import os
import stat
import zlib
from pathlib import Path
from typing import Any, Final

from headrace.errors import ConfigError

MARK: Final = 4096
"""Bytes before a reading place that say whether the file is still the one that was read."""
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
# With O_PATH a folder need not be readable, as for any other way to a file in it.
_FOLDER: Final = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class OwnerError(ConfigError):
    """The data that a run names is not to be opened for it."""


def open_plain(path: Path) -> io.FileIO:
    """The regular file at `path`, unbuffered. Raises OSError, also for links and for a folder that is one."""
    folder = os.open(path.parent, _FOLDER)
    try:
        handle = os.open(path.name, _FILE, dir_fd=folder)
    finally:
        os.close(folder)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return io.FileIO(handle)


def read_plain(path: Path, most: int, end: bool = False) -> bytes:
    """The first `most` bytes of the file, or with `end` the last; whole lines only where it is cut there. Raises
    OSError."""
    with open_plain(path) as file:
        begin = max(0, os.fstat(file.fileno()).st_size - most) if end else 0
        file.seek(max(0, begin - 1))
        content = bytearray()
        while len(content) < most + 1 and (block := file.read(most + 1 - len(content))):
            content += block
    # One byte more before the cut: when it ends a line, the first line is whole.
    return bytes(content[content.find(b"\n") + 1 :] if begin else content[:most])


def is_plain(path: Path) -> bool:
    """Whether there is a regular file, and no link to one; False where that cannot be seen."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except (OSError, ValueError):
        return False


def belongs_here(path: Path) -> bool:
    """Whether a file or folder, and no link, belongs to the dashboard's user or to root."""
    try:
        found = path.lstat()
    except (OSError, ValueError):
        return False
    return found.st_uid in (0, os.geteuid()) and not stat.S_ISLNK(found.st_mode)


def check_data_of(run_dir: Path) -> None:
    """Raise OwnerError unless the run is one of the dashboard's user or of root: its journal names the files whose text
    is shown, and they are read with this user's rights, so a run put here by another could name what only this user may
    read."""
    if not all(belongs_here(path) for path in (run_dir, run_dir / "journal.jsonl")):
        raise OwnerError("this run belongs to another user; the dashboard opens the data of its own user's runs only")


def mark_before(file: Any, offset: int) -> bytes:
    """CRC-32 of the `MARK` bytes of an open file before `offset`."""
    begin = max(0, offset - MARK)
    file.seek(begin)
    return zlib.crc32(file.read(offset - begin)).to_bytes(4, "big")


def readable(text: str) -> str:
    """Text that can be sent: what is no Unicode (bytes of another encoding in a name) is written out, `\\udce9`."""
    return text.encode("utf-8", "backslashreplace").decode()
