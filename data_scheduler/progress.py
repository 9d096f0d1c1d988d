"""How far a long task is: a bar on a terminal, plain lines elsewhere, nothing for tasks under a second."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SHOWN_AFTER = 1.0
"""Seconds; what takes less needs no progress."""
LINE_EVERY = 10.0
"""Seconds between plain lines."""


class Task:
    """`with Task("opening footers", 10_000) as task: … task.advance()`; writes to stderr.

    `plain` asks for lines on a terminal too: inside a run another bar may own it.
    """

    def __init__(self, what: str, total: int, *, plain: bool = False) -> None:
        self._what, self._total, self._done = what, max(1, total), 0
        self._bar: Progress | None = None
        self._plain = plain or not sys.stderr.isatty()
        self._began = time.monotonic()
        self._next = self._began + SHOWN_AFTER
        self._shown = False

    def __enter__(self) -> "Task":
        return self

    def advance(self, amount: int = 1) -> None:
        """`amount` more of the total is done."""
        self._done += amount
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done)
        elif time.monotonic() >= self._next:
            self._show()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._shown and kind is None:
            self._line(f"done in {time.monotonic() - self._began:.0f} s")

    def _show(self) -> None:
        self._shown, self._next = True, time.monotonic() + LINE_EVERY
        if self._plain:
            self._line(f"{min(100, 100 * self._done // self._total)} %")
            return
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._bar.add_task(self._what, total=self._total, completed=self._done)
        self._bar.start()

    def _line(self, state: str) -> None:
        sys.stderr.write(f"headrace: {self._what}: {state}\n")
        sys.stderr.flush()
