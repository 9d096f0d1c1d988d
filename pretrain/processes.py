"""Start N processes of one command on this machine, as `torchrun` would, and see them all to their end.

    code = start_processes([sys.executable, "-m", "pretrain", "train", "a.yaml"], nproc=4, env={}, log_dir=run / "log")

Every child gets RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Rank 0 writes to our own
output, the others to `<log_dir>/rank-<N>.log`. SIGTERM, SIGUSR1 and SIGINT are passed on and the children decide what
they mean (save and leave); a second SIGINT or SIGTERM kills. When a child fails its peers get `grace_s` seconds to
notice and say why themselves, then SIGTERM, then SIGKILL: a peer that waits in a collective would wait for ever.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from headrace.errors import ConfigError, ExitCode

FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
DECISIVE = (ExitCode.USER_ERROR, ExitCode.DATA_ERROR)
"""Codes that say why a run failed; they win over the codes of peers that only lost their connection."""
POLL_S = 0.05
LOG_TAIL_LINES = 15


class StopRequest:
    """What signals have told us."""

    asked = False
    """SIGTERM or SIGINT came: whoever started us wants the end."""
    insisted = False
    """It came twice."""


def start_processes(
    command: list[str],
    nproc: int,
    env: Mapping[str, str],
    log_dir: Path,
    grace_s: float = 10.0,
    stop: StopRequest | None = None,
    first_rank: int = 0,
) -> int:
    """Run `nproc` processes of `command` and return one exit code for all.

    `first_rank`: of these processes, where other machines run the rest; `env` then holds WORLD_SIZE, MASTER_ADDR and
    MASTER_PORT for all.

    0 when all left with 0; else the code of a rank that left with a user or data error; else that of the rank that
    failed first (-N when signal N ended it). `env` is added to our own environment; `stop` tells the caller afterwards
    whether a signal asked for the end. Raises ConfigError when the command cannot be started.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    shared = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // nproc)),  # N processes with all cores each are slower
        **os.environ,
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        **env,
    }
    children: list[subprocess.Popen[bytes]] = []
    stop = stop or StopRequest()
    with _forwarding(children, stop):
        try:
            for local in range(nproc):
                children.append(_start(command, first_rank + local, local, shared, log_dir))
            return _watch(children, stop, log_dir, grace_s, first_rank)
        finally:
            _kill(children, signal.SIGKILL)
            for child in children:
                child.wait()


def free_port() -> int:
    """A port of the loopback address that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(
    command: list[str], rank: int, local: int, shared: Mapping[str, str], log_dir: Path
) -> subprocess.Popen[bytes]:
    environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(local)}
    log = (log_dir / f"rank-{rank}.log").open("ab") if rank else None
    try:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT if log else None,
            # Its own session: a Ctrl-C reaches it once, through us, and its children can be killed with it.
            start_new_session=True,
            preexec_fn=_die_with_parent(os.getpid()),
        )
    except OSError as error:
        raise ConfigError(f"cannot start {command[0]}: {error.strerror}") from None
    finally:
        if log:
            log.close()


def _die_with_parent(parent: int) -> Callable[[], None]:
    """To be run in a child: ask the kernel for SIGTERM when we die, so that `kill -9` on us leaves no orphans."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl  # looked up before the fork, where only the call itself is safe
    pr_set_pdeathsig = 1

    def ask() -> None:
        prctl(pr_set_pdeathsig, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != parent:
            os._exit(ExitCode.RECOVERABLE)

    return ask


@contextmanager
def _forwarding(children: list[subprocess.Popen[bytes]], stop: StopRequest) -> Iterator[None]:
    """Pass signals on to the children while inside."""

    def forward(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGUSR1:
            stop.insisted = stop.asked
            stop.asked = True
        for child in children:
            child.send_signal(number)

    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread only
        return
    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(
    children: list[subprocess.Popen[bytes]], stop: StopRequest, log_dir: Path, grace_s: float, first_rank: int
) -> int:
    first: int | None = None
    """Rank that failed first."""
    deadlines: list[tuple[float, signal.Signals]] = []
    while None in [child.poll() for child in children]:
        failed = [rank for rank, child in enumerate(children) if child.returncode]
        if failed and first is None:
            first = failed[0]
            now = time.monotonic()
            deadlines = [(now + grace_s, signal.SIGTERM), (now + grace_s + min(grace_s, 5.0), signal.SIGKILL)]
        if stop.insisted:
            _kill(children, signal.SIGKILL)
        if deadlines and time.monotonic() >= deadlines[0][0]:
            _kill(children, deadlines.pop(0)[1])
        time.sleep(POLL_S)
    codes = [child.returncode for child in children]
    failed = [rank for rank, code in enumerate(codes) if code]
    if not failed:
        return int(ExitCode.DONE)
    decisive = [rank for rank in failed if codes[rank] in DECISIVE]
    rank = decisive[0] if decisive else first if first is not None else failed[0]
    _explain(first_rank + rank, codes[rank], log_dir)
    return codes[rank]


def _explain(rank: int, code: int, log_dir: Path) -> None:
    """Say which rank failed, with the end of its log: rank 0's output has been seen, the others' has not.

    Of a mistake of the user that rank 0 has named in its own line, nothing more need be said.
    """
    if rank == 0 and code in DECISIVE:
        return
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"
    sys.stderr.write(f"headrace: rank {rank} {how}\n")
    if rank:
        log = log_dir / f"rank-{rank}.log"
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:]
        sys.stderr.write(f"  last lines of {log}:\n" + "".join(f"    {line}\n" for line in lines))
    sys.stderr.flush()


def _kill(children: list[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    """Signal the sessions of children that still run, with whatever they started."""
    for child in children:
        if child.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, number)
