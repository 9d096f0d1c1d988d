"""Writes a sharded state to a folder, in this process or behind its back, with a checksum of every file.

    write = BackgroundWrite(sharded_state_dict, folder, behind=True)    # returns when the state has been copied
    ...                                                                 # steps go on
    if not write.is_writing:
        sums = write.finish()                                           # every rank; then the folder can be loaded

Behind the back means a forked process. It sees the memory of the moment of the fork: tensors on a GPU are copied to the
host first, those on a CPU are not copied at all, the kernel keeps the pages that training changes meanwhile. The child
writes one file after another and no grandchildren are started (megatron's own writer starts some), so that a process
that dies takes its writer with it and nobody writes into a folder that somebody else has begun to use.
"""

import ctypes
import gc
import multiprocessing
import multiprocessing.process
import os
import pickle
import queue
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from parallel.engine import FileSystemWriterAsync, dist_checkpointing, results_queue
from parallel.file_sum import FileSum, file_sum
from parallel.late_errors import errors_at_the_end

_PR_SET_PDEATHSIG = 1


class BackgroundWrite:
    """One rank's part of a save. Every rank makes one at the same time, and finishes it at the same time."""

    def __init__(self, sharded_state_dict: dict[str, Any], folder: Path, *, behind: bool) -> None:
        """Plans the save with the other ranks, copies what is on a GPU, and begins to write. Raises OSError."""
        began = time.perf_counter()
        with errors_at_the_end():
            self._request = dist_checkpointing.save(sharded_state_dict, str(folder), async_sharded_save=True)
        self._written: _Outcome | None = None
        self._child: _Child | None = None
        if self._request.async_fn is None:  # this rank has nothing to write
            self._written = _Outcome(None, {})
        else:
            buckets, transforms = self._request.preload_fn(), self._request.async_fn.args[0]
            if behind:
                self._child = _Child(lambda: _write(buckets, transforms, folder))
            else:
                self._written = _write(buckets, transforms, folder)
        self.stall_s = time.perf_counter() - began
        """Seconds for which the caller was held up."""

    @property
    def is_writing(self) -> bool:
        """Whether this rank's files are still being written."""
        return self._child is not None and self._child.is_busy

    def finish(self) -> dict[str, FileSum]:
        """Wait for this rank's files, then with all ranks make the folder one that can be loaded; sums by file name.

        Raises OSError on the rank that could not write, and whatever megatron makes of it on the others.
        """
        outcome = self._written if self._child is None else self._child.outcome()
        assert outcome is not None
        if outcome.results is not None:
            results_queue.put(outcome.results)
        with errors_at_the_end():
            for finalize in self._request.finalize_fns:
                finalize()
        return outcome.sums

    def abandon(self) -> None:
        """End the writer; what it has written stays behind, unfinished."""
        if self._child is not None:
            self._child.kill()


@dataclass(frozen=True)
class _Outcome:
    results: Any
    """What megatron wants to hear: dict of bucket to list of its results, or an exception; None: nothing to write."""
    sums: dict[str, FileSum]


class _Child:
    """A forked process that computes one answer."""

    def __init__(self, act: Callable[[], _Outcome]) -> None:
        fork = multiprocessing.get_context("fork")
        self._receiver, sender = fork.Pipe(duplex=False)
        self._process = fork.Process(target=_answer, args=(sender, act, os.getpid()))
        # A collection in the child would end process groups whose threads only the parent has, and wait for ever.
        collects = gc.isenabled()
        gc.disable()
        try:
            self._process.start()
        finally:
            if collects:
                gc.enable()
        sender.close()  # so that the end of the child is the end of what there is to receive

    @property
    def is_busy(self) -> bool:
        return not self._receiver.poll() and self._process.is_alive()

    def outcome(self) -> _Outcome:
        try:
            outcome: _Outcome = self._receiver.recv()
        except (EOFError, OSError, pickle.UnpicklingError):
            self._process.join()
            code = self._process.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return _Outcome(OSError(0, f"the process that wrote the checkpoint ended early ({how})"), {})
        self._process.join()
        return outcome

    def kill(self) -> None:
        self._process.kill()
        # Python would wait for it at the end, and a process that waits for a dead disk cannot be killed.
        multiprocessing.process._children.discard(self._process)  # type: ignore[attr-defined]


def _answer(sender: Connection, act: Callable[[], _Outcome], parent: int) -> None:
    """What the child does. It leaves without Python's farewell: that would run the parent's exit handlers."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # meant for the run, which will wait for this save
    if os.getppid() != parent:
        os._exit(1)
    sender.send(act())
    sender.close()
    os._exit(0)


def _write(buckets: list[Any], transforms: list[Any], folder: Path) -> _Outcome:
    """Write megatron's buckets, one file each, and sum up the files."""
    results: dict[int, Any] = {}
    for number, bucket in enumerate(buckets):
        answers: queue.Queue[Any] = queue.Queue()
        begun: queue.Queue[int] = queue.Queue()
        begun.put(number)
        FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, answers, begun, use_fsync=True)
        _, results[number] = answers.get()
        if isinstance(results[number], Exception):
            return _Outcome(results[number], {})
    try:
        return _Outcome(results, {Path(path).name: file_sum(Path(path)) for path, _, _ in buckets})
    except OSError as error:
        return _Outcome(error, {})
