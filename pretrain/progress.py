"""What a person sees while a run trains: a live line on a terminal, plain lines everywhere else.

    with Progress(total_steps=300, start_step=0, enabled=config.metrics.progress) as progress:
        progress.update(record)        # after every step
        progress.note("checkpoint at step 100")

On a terminal, one line that redraws itself:

    step 120/300 ━━━━━━━━━━╸━━━━━━━━━━━  loss 4.812  18.4k tok/s  data wait 0.3%  1:02 left

In a log file, a line for the first step, the last, and the first one that ends `every_s` seconds after the line before:

    step 120/300  loss 4.8123  18.4k tok/s  data wait 0.3%  1:02 left
"""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar

from pretrain.metrics.registry import Record

SMOOTHING = 0.9
"""Share of the old value in the shown speed and data wait; about the last ten steps count."""


class Progress:
    """Shows training records as they come. Use on rank 0 only."""

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        enabled: bool = True,
        console: Console | None = None,
        every_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        given: Callable[[int], int] = int,
    ) -> None:
        """given: work before a step, by which the time left is told; every step alike by default."""
        self._total = total_steps
        self._start = start_step
        # Standard error: what a command prints to standard output can then be piped.
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._live = enabled and self._console.is_terminal and not self._console.is_dumb_terminal
        self._every_s = every_s
        self._clock = clock
        self._given = given
        self._started_at = self._printed_at = clock()
        self._printed = False
        self._tokens_per_s = 0.0
        self._waiting = 0.0
        self._bar = Bar(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("{task.description}"),
            console=self._console,
            transient=True,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if self._live:
            self._bar.start()
            self._task = self._bar.add_task("", total=self._total, completed=self._start)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._bar.stop()

    def update(self, record: Record) -> None:
        """Show a training record."""
        done = record["step"] + 1
        self._smooth(record)
        now = self._clock()
        if self._task is not None:
            self._bar.update(self._task, completed=done, description=self._text(record, now))
            if done == self._total:
                self._console.print(self._line(record, now), markup=False)
        elif not self._printed or done == self._total or now - self._printed_at >= self._every_s:
            self._printed, self._printed_at = True, now
            self._console.print(self._line(record, now), markup=False)

    def note(self, text: str) -> None:
        """Print one line that stays, above the live line where there is one."""
        self._console.print(text, markup=False)

    def evaluated(self, record: Record) -> None:
        """Show an evaluation record."""
        losses = "  ".join(f"{source} {loss:.4f}" for source, loss in record["val_loss"].items())
        self.note(f"step {record['step']}/{self._total}  validation loss: {losses}")

    def _line(self, record: Record, now: float) -> str:
        return f"step {record['step'] + 1}/{self._total}  {self._text(record, now)}"

    def _text(self, record: Record, now: float) -> str:
        done = record["step"] + 1
        parts = [
            f"loss {record['loss']:.4f}",
            f"{short(self._tokens_per_s)} tok/s",
            f"data wait {100 * self._waiting:.1f}%",
        ]
        if done < self._total:
            before, by_now, in_all = (self._given(step) for step in (self._start, done, self._total))
            left = (now - self._started_at) / (by_now - before) * (in_all - by_now)
            parts.append(f"{clock_time(left)} left")
        return "  ".join(parts)

    def _smooth(self, record: Record) -> None:
        speed = float(record["tokens_per_s"])
        tokens = sum(record["source_tokens"].values())
        step_s = record.get("step_s") or (tokens / speed if speed else 0.0)
        waiting = min(1.0, record["data_wait_s"] / step_s) if step_s else 0.0
        # The first step of a process warms up kernels and caches; it is shown, then forgotten.
        keep = 0.0 if record["step"] <= self._start + 1 else SMOOTHING
        self._tokens_per_s = keep * self._tokens_per_s + (1 - keep) * speed
        self._waiting = keep * self._waiting + (1 - keep) * waiting


def short(number: float) -> str:
    """A number in four characters or so: 932, 18.4k, 1.20M."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit * 0.9995:
            scaled = number / limit
            return (
                f"{scaled:.2f}{unit}"
                if scaled < 9.995
                else f"{scaled:.1f}{unit}"
                if scaled < 99.95
                else f"{scaled:.0f}{unit}"
            )
    return f"{number:.0f}"


def clock_time(seconds: float) -> str:
    """Seconds as 0:42, 1:02:03 or 3d 04:05."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
