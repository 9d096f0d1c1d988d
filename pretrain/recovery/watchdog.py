"""A process that makes no progress says where it stands, and ends with exit code 5, so that a launcher can start anew.

    with Watchdog(timeout_s=540, folder=run_dir / "log", rank=3) as watchdog:
        watchdog.more["data loader"] = scheduler.describe
        for step in ...:
            watchdog.beat(f"step {step}")
        watchdog.rest()

It watches from the first beat on, and not while it rests.

A step that takes longer than `timeout_s` is taken for a hang: a peer that was stopped or lost its network, a collective
that not all ranks entered, a file system that does not answer. What the process was doing goes to
`watchdog-rank-00003.txt`: the last beat, what `more` has to tell, torch's record of the last collectives, and the
Python stack of every thread.

Time is the monotonic clock, so that a clock that is set does not matter. A thread watches; it needs Python's global
lock. Should the hang hold that, the kernel ends the process with SIGALRM a quarter of the timeout later, its stacks
having been written by `faulthandler`, which needs no lock.
"""

import contextlib
import faulthandler
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import torch

from headrace.errors import ExitCode

LATER = 1.25
"""The kernel ends a process that holds Python's lock after this many timeouts."""
REPORT_S = 30.0
"""The report may take so long, on a machine or a file system that is slow; then the process ends without."""


class Watchdog:
    """Watches this process while open. Use on the main thread. With `timeout_s` 0 it does nothing."""

    def __init__(
        self,
        timeout_s: float,
        folder: Path,
        rank: int,
        more: Mapping[str, Callable[[], str]] | None = None,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self._timeout_s, self._folder, self._rank = timeout_s, folder, rank
        self.more, self._end = dict(more or {}), end
        """What else to ask when it has to report, by name."""
        self._last, self._doing = math.inf, "start"
        self._over = threading.Event()
        self._stacks: IO[str] | None = None
        self._alarm: Any = signal.SIG_DFL
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    @property
    def report(self) -> Path:
        """Where it writes what it saw."""
        return self._folder / f"watchdog-rank-{self._rank:05d}.txt"

    def beat(self, doing: str) -> None:
        """This process makes progress; `doing` is what it turns to now."""
        if not self._timeout_s:
            return
        if self._stacks is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            name = self._folder / f".stacks-rank-{self._rank:05d}.txt"
            self._stacks = open(name, "w", encoding="utf-8")  # noqa: SIM115  (closed at the exit)
            # A handler of somebody else's, pytest-timeout's for one, would keep the kernel from ending us.
            self._alarm = signal.signal(signal.SIGALRM, signal.SIG_DFL)
        self._last, self._doing = time.monotonic(), doing
        self._arm()

    def rest(self) -> None:
        """Nothing is to be watched until the next beat."""
        self._last = math.inf
        if self._stacks is not None:
            self._disarm()

    def __enter__(self) -> Self:
        if self._timeout_s:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._timeout_s:
            return
        self._over.set()
        self._thread.join()
        if self._stacks is None:
            return
        self._disarm()
        signal.signal(signal.SIGALRM, self._alarm)
        self._stacks.close()
        Path(self._stacks.name).unlink(missing_ok=True)

    def _disarm(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _arm(self) -> None:
        assert self._stacks is not None
        faulthandler.dump_traceback_later(self._timeout_s * (LATER - 0.05), file=self._stacks)
        signal.setitimer(signal.ITIMER_REAL, self._timeout_s * LATER)

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._timeout_s / 10)):
            quiet = time.monotonic() - self._last
            if quiet > self._timeout_s:
                if self._stacks is not None:  # Python's lock is free: there is time for the report, but no end of it
                    signal.setitimer(signal.ITIMER_REAL, REPORT_S)
                self._write(quiet)
                self._end(ExitCode.WATCHDOG)
                return

    def _write(self, quiet: float) -> None:
        os.write(  # before the report, which may have to go to the file system that is the trouble
            2,
            f"headrace: rank {self._rank}: no progress for {quiet:.0f} s since: {self._doing}; what it was doing is in "
            f"{self.report}\n".encode(),
        )
        with contextlib.suppress(OSError), open(self.report, "w", encoding="utf-8") as file:
            print(
                f"rank {self._rank}, process {os.getpid()}: no progress for {quiet:.0f} s since: {self._doing}",
                file=file,
            )
            for name, tell in self.more.items():
                print(f"\n{name}:\n{_told(tell)}", file=file)
            print(f"\nlast collectives:\n{_told(_collectives)}", file=file)
            print("\nstacks:", file=file, flush=True)
            faulthandler.dump_traceback(file=file, all_threads=True)


def _told(tell: Callable[[], str]) -> str:
    try:
        return tell()
    except Exception as error:  # the program is in an unknown state; the rest of the report is worth more
        return f"cannot be told: {type(error).__name__}: {error}"


def _collectives() -> str:
    """torch's flight recorder, as JSON; with NCCL it must be switched on (TORCH_NCCL_TRACE_BUFFER_SIZE)."""
    text = torch._C._distributed_c10d._dump_fr_trace_json(True, False)  # type: ignore[attr-defined]
    return text.decode() if isinstance(text, bytes) else str(text)
