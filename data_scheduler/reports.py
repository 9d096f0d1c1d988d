"""Reports of trained steps, on their way from the trainer's thread to the policy that waits for them in another."""

import threading
from collections.abc import Iterable
from typing import Any

from data_scheduler.loader import Loader, Stopped
from data_scheduler.policies import Feedback


class Reports:
    """What training told and no policy has heard yet."""

    def __init__(self) -> None:
        self._known: dict[int, Feedback] = {}
        self._changed = threading.Condition()
        self._ended = False

    def add(self, report: Feedback) -> None:
        """Let those that wait have a step's report."""
        with self._changed:
            self._known[report.step] = report
            self._changed.notify_all()

    def reset(self, reports: Iterable[Feedback]) -> None:
        """Know these reports and no others."""
        with self._changed:
            self._known = {report.step: report for report in reports}

    def forget(self, last: int) -> None:
        """Drop the reports of steps up to `last`: nobody will ask for them."""
        with self._changed:
            self._known = {step: report for step, report in self._known.items() if step > last}

    def take(self, first: int, last: int) -> list[Feedback]:
        """The reports of these steps, both included, once all are there. Raises Stopped when `end` comes first."""
        taken = []
        with self._changed:
            for step in range(first, last + 1):
                self._changed.wait_for(lambda step=step: step in self._known or self._ended)  # type: ignore[misc]
                if self._ended:
                    raise Stopped
                taken.append(self._known.pop(step))
        return taken

    def begin(self) -> None:
        """From here on a thread may wait for reports."""
        self._ended = False

    def end(self, loader: Loader[Any]) -> None:
        """Stop a loader's thread, which may be waiting for a report."""
        with self._changed:
            self._ended = True
            loader.stopping.set()
            self._changed.notify_all()
        loader.stop()
