"""One run folder, one training: the first rank holds a lock on the folder while it trains.

    with holding(Path("runs/mill"), ranks.rank):  # every rank
        ...

Two runs in one folder would write one journal, and then neither could be resumed. The lock is POSIX's: it goes with its
process, however that ends, is not inherited by processes that write checkpoints, and holds over NFS.
"""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headrace.errors import BusyError
from parallel import exchange

NAME = "log/lock"
PATIENCE_S = 10.0
"""For a run that was asked to end and still saves while its launcher has started it again."""
UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""File systems without locks: the run goes on without."""


@contextmanager
def holding(run_dir: Path, rank: int) -> Iterator[None]:
    """Raises BusyError, on every rank, when another process trains in the folder and goes on doing so."""
    lock = _Lock(run_dir)
    exchange.only_first_rank(lambda: lock.take(PATIENCE_S), rank)
    try:
        yield
    finally:
        lock.release()


class _Lock:
    def __init__(self, run_dir: Path) -> None:
        self._run_dir, self._path = run_dir, run_dir / NAME
        self._file: int | None = None

    def take(self, patience_s: float) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Closing any descriptor of the file would end this process's lock: it is opened here only.
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        until = time.monotonic() + patience_s
        while not self._is_ours():
            if time.monotonic() > until:
                holder = os.read(self._file, 200).decode(errors="replace").strip() or "which did not say who it is"
                self.release()
                raise BusyError(f"{self._run_dir}: another process trains in this folder ({holder}); one at a time")
            time.sleep(0.1)
        os.ftruncate(self._file, 0)
        os.write(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def _is_ours(self) -> bool:
        assert self._file is not None
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in UNSUPPORTED
        return True

    def release(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
