"""Commands as files: works on every file system that can rename, needs no lock, and many may ask at once.

    <run>/control/inbox/<id>.json      asked: written under another name, then renamed
    <run>/control/taken/<id>.json      the run has it: renamed by the run, so that it is either here or still there
    <run>/control/answers/<id>.json    answered; the taken file is gone. Whoever asked removes it
    <run>/control/refused/             what was in the inbox under a name that is no request's

Who may write in the folder may command the run: a command is recorded as of the file's owner, whatever it says. Files
are met with suspicion nevertheless, since a folder may be shared more widely than one thinks: links, devices, pipes and
folders are not opened, no more than the size limit is read, and contents go through `request.read_request`.
"""

import contextlib
import errno
import os
import pwd
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from data_scheduler.control import RefusedError
from pretrain.control.request import ID, MAX_BYTES, Request, read_request

POLL_S = 0.2
"""Between two looks: a look is one listing of a folder that is nearly always empty."""
AT_ONCE = 64
"""Files taken in one look; more wait for the next."""


class Folder:
    """`<run>/control`, from either side."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "control"
        self.inbox, self.taken, self.answers, self.refused = (
            self.path / name for name in ("inbox", "taken", "answers", "refused")
        )

    def create(self) -> None:
        """Make the folders. Raises OSError."""
        for folder in (self.inbox, self.taken, self.answers, self.refused):
            folder.mkdir(parents=True, exist_ok=True)


def put_file(folder: Path, name: str, content: bytes, mode: int = 0o644) -> None:
    """`folder/name` with `content`, whole or not there at all; a link of that name is replaced, not followed."""
    partial = folder / f".{name}.{os.getpid()}-{threading.get_ident()}"
    file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    try:
        with os.fdopen(file, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, folder / name)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        raise


def read_file(path: Path) -> tuple[bytes, str]:
    """(content, owner's name) of a plain file of the size of a request. Raises RefusedError, or OSError."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.EACCES):
            raise RefusedError("not a plain file that can be read") from None
        raise
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise RefusedError("not a plain file")
        content = b""
        while len(content) <= MAX_BYTES and (part := os.read(file, MAX_BYTES + 1 - len(content))):
            content += part
    finally:
        os.close(file)
    if len(content) > MAX_BYTES:
        raise RefusedError(f"a request has {MAX_BYTES} bytes at most")
    return content, _owner(found.st_uid)


def _owner(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid-{uid}"


Hand = Callable[[Request, str, Callable[[dict[str, Any]], None]], None]
"""(request, who and where, what to do with the answer)"""


class Inbox:
    """Takes files and hands them on, from a thread of its own: the run never waits for a slow file system."""

    def __init__(self, folder: Folder, hand: Hand) -> None:
        """Raises OSError when the folder cannot be made."""
        self._folder, self._hand = folder, hand
        folder.create()
        self._stopping = threading.Event()
        self._known: set[str] = set()
        """Ids that were handed on and are not answered yet."""
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="headrace-inbox", daemon=True)

    def start(self) -> None:
        """Begin to look; what a run that was killed had taken comes first."""
        for answered in self._folder.answers.iterdir():
            if answered.name.startswith("."):
                answered.unlink(missing_ok=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no more; what is in the inbox stays there."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            # A file system that fails for a while is looked at again; the run goes on.
            with contextlib.suppress(OSError):
                self.look()
            if self._stopping.wait(POLL_S):
                return

    def look(self) -> None:
        """Take what has arrived."""
        taken = sorted(os.listdir(self._folder.taken))
        with self._lock:
            left = [name for name in taken if name not in self._known]
        for name in left[:AT_ONCE]:
            self._read(name)
        arrived = [name for name in os.listdir(self._folder.inbox) if not name.startswith(".")]  # being written
        for name in sorted(arrived)[:AT_ONCE]:
            if not (name.endswith(".json") and ID.fullmatch(name.removesuffix(".json"))):
                self._put_aside(self._folder.inbox / name)
                continue
            with contextlib.suppress(FileNotFoundError):  # withdrawn
                os.rename(self._folder.inbox / name, self._folder.taken / name)
                self._read(name)

    def _put_aside(self, path: Path) -> None:
        with contextlib.suppress(OSError):
            os.rename(path, self._folder.refused / f"{time.time_ns()}-{path.name[-100:]}")

    def _read(self, name: str) -> None:
        path, identity = self._folder.taken / name, name.removesuffix(".json")
        try:
            content, owner = read_file(path)
            request = read_request(content)
            if request.id != identity:
                raise RefusedError(f"the id in it is {request.id}, not the file's")
        except FileNotFoundError:
            return
        except RefusedError as error:
            if ID.fullmatch(identity):
                self._answer(name, {"id": identity, "status": "refused", "reason": str(error)})
            else:
                self._put_aside(path)
            return
        with self._lock:
            self._known.add(name)
        self._hand(request, f"{owner}@{request.host}", lambda answer: self._answer(name, answer))

    def _answer(self, name: str, answer: dict[str, Any]) -> None:
        """Write the answer, then let go of the file: killed in between, it is answered again."""
        with contextlib.suppress(OSError):  # a full disk: whoever asked hears nothing; the journal has what was decided
            put_file(self._folder.answers, name, orjson.dumps(answer))
            taken = self._folder.taken / name
            if stat.S_ISDIR(os.lstat(taken).st_mode):
                self._put_aside(taken)
            else:
                os.unlink(taken)
        with self._lock:
            self._known.discard(name)
