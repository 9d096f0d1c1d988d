"""Signals that ask a run to save and leave."""

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class stopping_on_signals:
    """While open, the first SIGTERM, SIGUSR1 or SIGINT asks to stop after the step; a second one ends at once."""

    def __init__(self, ask: Callable[[], None]) -> None:
        self._ask = ask
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        def handle(number: int, _: FrameType | None) -> None:
            self._ask()
            if number != signal.SIGUSR1:
                signal.signal(number, self._old[signal.Signals(number)])

        for number in STOP_SIGNALS:
            self._old[number] = signal.signal(number, handle)

    def __exit__(self, *_: object) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)
