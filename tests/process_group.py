"""Runs a function as several gloo processes, in a fraction of a second.

The pytest process has imported torch and megatron-core once; each rank is a fork of it, so starting four ranks takes
0.3 s where a launcher that starts fresh interpreters takes ten. Ranks find each other as under torchrun: the
environment variables are set and the rendezvous store lives in the parent, on a port the system picked.

    def losses(layout):            # runs in every rank; may be a closure
        ranks = process_groups.initialize(layout, seed=1)
        ...
        return result              # anything that can be pickled

    results = run_ranks(2, losses, Layout(2, tensor_parallel_size=2))
"""

import contextlib
import ctypes
import faulthandler
import gc
import os
import pickle
import selectors
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any

import pytest
import torch
from torch._C._distributed_c10d import TCPStore

from parallel import accelerator, process_groups

GRACE_S = 1.0
"""After a rank failed, its peers fail too ("connection closed by peer"); they get so long to say it."""


class RanksFailedError(AssertionError):
    """One of the ranks raised, died or hung; the message holds its traceback."""


@dataclass
class _Rank:
    pid: int
    pipe: int
    stacks: IO[bytes]
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
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    # Process groups of earlier tests, kept alive by cycles, must go here: their destructors join threads that a fork
    # does not have, so a collection in a rank would wait for ever. freeze() keeps ranks from collecting what is ours.
    gc.collect()
    gc.freeze()
    sys.stdout.flush()
    sys.stderr.flush()
    ranks = [_start(rank, world_size, store.port, function, args, timeout_s) for rank in range(world_size)]
    try:
        _collect(ranks, timeout_s)
    finally:
        gc.unfreeze()
        for rank in ranks:
            _end(rank)
    failures = [(rank.outcome, number) for number, rank in enumerate(ranks) if rank.outcome and not rank.outcome[0]]
    if failures:
        (_, _, text), number = min(failures, key=lambda failure: failure[0][1])
        raise RanksFailedError(f"rank {number} of {world_size} failed first:\n{text}")
    if any(rank.outcome is None for rank in ranks):
        raise RanksFailedError(f"no result after {timeout_s:g} s\n" + "\n".join(map(_stacks, range(world_size), ranks)))
    return [rank.outcome[2] for rank in ranks if rank.outcome]


def _start(
    rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...], timeout_s: float
) -> _Rank:
    read_end, write_end = os.pipe()
    stacks = tempfile.TemporaryFile()  # noqa: SIM115  (kept until the rank has ended)
    pid = os.fork()
    if pid:
        os.close(write_end)
        return _Rank(pid, read_end, stacks)
    code = 1
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end when pytest is ended
        os.setsid()  # so that a rank's own children (checkpoint writers) can be ended with it
        faulthandler.dump_traceback_later(max(0.5, timeout_s - 1.0), file=stacks)
        outcome = _run(rank, world_size, port, function, args)
        with os.fdopen(write_end, "wb") as pipe:
            pipe.write(outcome)
        code = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    """In the child: the pickled outcome."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # the parent holds the store; every rank is a client of it
    )
    torch.set_num_threads(1)  # also keeps OpenMP from using a thread pool that did not survive the fork
    try:
        result = function(*args)
        process_groups.shutdown()
        return pickle.dumps((True, time.monotonic(), result))
    except BaseException:
        return pickle.dumps((False, time.monotonic(), traceback.format_exc()))


def _collect(ranks: list[_Rank], timeout_s: float) -> None:
    """Read outcomes until all are here, the time is over, or a rank failed and its peers had their grace."""
    deadline = time.monotonic() + timeout_s
    with selectors.DefaultSelector() as selector:
        for rank in ranks:
            selector.register(rank.pipe, selectors.EVENT_READ, rank)
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(timeout=left):
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
