"""Runs a function as several gloo processes, in a fraction of a second.

The pytest process has imported torch and megatron-core once; each rank is a fork of it, so starting four ranks takes
0.3 s where a launcher that starts fresh interpreters takes ten. Ranks find each other as under torchrun: the
environment variables are set; only the rendezvous store is a file here and no server, so that the forking process has
no thread of it and no port is taken.

    def losses(layout):            # runs in every rank; may be a closure
        ranks = process_groups.initialize(layout, seed=1)
        ...
        return result              # anything that can be pickled

    results = run_ranks(2, losses, Layout(2, tensor_parallel_size=2))
"""

import contextlib
import ctypes
import faulthandler
import fcntl
import functools
import gc
import mmap
import os
import pickle
import selectors
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pytest
import torch
import torch.distributed as dist

from parallel import accelerator, process_groups

GRACE_S = 1.0
"""After a rank failed, its peers fail too ("connection closed by peer"); they get so long to say it."""
JOIN_S = 15.0
"""Joining takes 0.1 s. Once in several thousand starts gloo's first connection never comes (seen inside the constructor
of ProcessGroupGloo, before any code of ours or of a test ran); ranks that have not joined by now are started again."""
ATTEMPTS = 3


class RanksFailedError(AssertionError):
    """One of the ranks raised, died or hung; the message holds its traceback."""


@dataclass
class _Rank:
    pid: int
    pipe: int
    stacks: IO[bytes]
    joining: mmap.mmap
    """One byte shared with the rank: 1 while it waits for the others in init_process_group."""
    received: bytearray = field(default_factory=bytearray)
    outcome: tuple[bool, float, Any] | None = None
    """(returned, monotonic time, result or traceback)"""


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 60.0) -> list[Any]:
    """`function(*args)` in `world_size` processes; their results in rank order.

    Process groups the function leaves open are closed for it, behind a barrier. Raises RanksFailedError with the
    traceback of the rank that failed first, or with every rank's stacks when the time is over. No process outlives
    the call.
    """
    if accelerator.has_gpu():
        pytest.skip("runs gloo ranks by forking, which a process that holds a GPU cannot do; hide it to run this test")
    with _one_at_a_time():
        return _run_ranks(world_size, function, args, timeout_s)


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Two tests' ranks at once, on cores that one test's fill, take longer than one after the other: gloo wakes every
    thread of theirs a hundred times a second for as long as they wait."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is None:
        yield
        return
    with open(Path(tempfile.gettempdir()) / f"headrace-ranks-{run}", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # closing is not enough: what the ranks started may have the file open too


def _run_ranks(world_size: int, function: Callable[..., Any], args: tuple[Any, ...], timeout_s: float) -> list[Any]:
    # Process groups of earlier tests, kept alive by cycles, must go here: their destructors join threads that a fork
    # does not have, so a collection in a rank would wait for ever. freeze() keeps ranks from collecting what is ours.
    gc.collect()
    gc.freeze()
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        for _ in range(ATTEMPTS):
            ranks, never_joined = _attempt(world_size, function, args, timeout_s)
            if not never_joined:
                break
            warnings.warn(f"{world_size} ranks did not find each other in {JOIN_S:g} s", stacklevel=2)
    finally:
        gc.unfreeze()
    failures = [(rank.outcome, number) for number, rank in enumerate(ranks) if rank.outcome and not rank.outcome[0]]
    if failures:
        (_, _, text), number = min(failures, key=lambda failure: failure[0][1])
        raise RanksFailedError(f"rank {number} of {world_size} failed first:\n{text}")
    if any(rank.outcome is None for rank in ranks):
        raise RanksFailedError(f"no result after {timeout_s:g} s\n" + "\n".join(map(_stacks, range(world_size), ranks)))
    return [rank.outcome[2] for rank in ranks if rank.outcome]


def _attempt(
    world_size: int, function: Callable[..., Any], args: tuple[Any, ...], timeout_s: float
) -> tuple[list[_Rank], bool]:
    """The ranks after they ended or were ended, and whether that was because they never joined each other."""
    with tempfile.TemporaryDirectory(prefix="ranks") as folder:
        store = f"{folder}/store"
        ranks = [_start(rank, world_size, store, function, args, timeout_s) for rank in range(world_size)]
        try:
            return ranks, _collect(ranks, timeout_s)
        finally:
            for rank in ranks:
                _end(rank)


def _start(
    rank: int, world_size: int, store: str, function: Callable[..., Any], args: tuple[Any, ...], timeout_s: float
) -> _Rank:
    read_end, write_end = os.pipe()
    stacks = tempfile.TemporaryFile()  # noqa: SIM115  (kept until the rank has ended)
    joining = mmap.mmap(-1, 1)
    pid = os.fork()
    if pid:
        os.close(write_end)
        return _Rank(pid, read_end, stacks, joining)
    code = 1
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end when pytest is ended
        os.setsid()  # so that a rank's own children (checkpoint writers) can be ended with it
        faulthandler.dump_traceback_later(max(0.5, timeout_s - 1.0), file=stacks)
        outcome = _run(rank, world_size, store, joining, function, args)
        with os.fdopen(write_end, "wb") as pipe:
            pipe.write(outcome)
        code = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(
    rank: int, world_size: int, store: str, joining: mmap.mmap, function: Callable[..., Any], args: tuple[Any, ...]
) -> bytes:
    """In the child: the pickled outcome."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
    )
    torch.set_num_threads(1)  # also keeps OpenMP from using a thread pool that did not survive the fork
    init_process_group = dist.init_process_group

    @functools.wraps(init_process_group)
    def join(*positional: Any, **named: Any) -> None:
        joining[0] = 1
        init_process_group(*positional, **{"store": dist.FileStore(store, world_size)} | named)
        joining[0] = 0

    dist.init_process_group = join
    try:
        result = function(*args)
        process_groups.shutdown()
        return pickle.dumps((True, time.monotonic(), result))
    except BaseException:
        return pickle.dumps((False, time.monotonic(), traceback.format_exc()))


def _collect(ranks: list[_Rank], timeout_s: float) -> bool:
    """Read outcomes until all are here, the time is over, or a rank failed and its peers had their grace.

    True when it was given up because every rank without an outcome still waits for the others to join.
    """
    started = time.monotonic()
    deadline = started + timeout_s
    with selectors.DefaultSelector() as selector:
        for rank in ranks:
            selector.register(rank.pipe, selectors.EVENT_READ, rank)
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            ready = selector.select(timeout=min(left, JOIN_S))
            if not ready and time.monotonic() - started >= JOIN_S and all(rank.joining[0] for rank in ranks):
                return True
            for key, _ in ready:
                rank = key.data
                if chunk := os.read(rank.pipe, 1 << 16):
                    rank.received += chunk
                    continue
                selector.unregister(rank.pipe)
                if rank.received:
                    rank.outcome = pickle.loads(bytes(rank.received))
                else:
                    _, status = os.waitpid(rank.pid, 0)
                    rank.pid = 0
                    died = f"process ended with {os.waitstatus_to_exitcode(status)} and no result"
                    rank.outcome = (False, 0.0, died)  # before all others: they failed because this one was gone
                if not rank.outcome[0]:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
    return False


def _end(rank: _Rank) -> None:
    os.close(rank.pipe)
    if rank.pid:
        if rank.outcome is None:
            os.kill(rank.pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):  # no group of its own yet, or already empty
                os.killpg(rank.pid, signal.SIGKILL)
        os.waitpid(rank.pid, 0)


def _stacks(number: int, rank: _Rank) -> str:
    rank.stacks.seek(0)
    return f"rank {number}:\n{rank.stacks.read().decode(errors='replace')}"
