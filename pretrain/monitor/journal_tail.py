"""A run's journal as it grows, for reading only; damage is told, never mended."""

import os
import threading
from pathlib import Path
from typing import Any, Final

from data_scheduler.journal import Event, Journal
from data_scheduler.plan import Plan

MOST_TEXT: Final = 2000
"""Characters of a text in an event that are shown."""
SHOWN: Final = (
    "anomaly",
    "cause",
    "action",
    "attempt",
    "to",
    "why",
    "via",
    "over",
    "value",
    "weights",
    "kind",
    "source",
)
"""What of an event's data goes to the page; manifests can have a million files."""


class JournalTail:
    """The events so far, and what they say about the mixture."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.events: list[Event] = []
        self.damage = ""
        """What is wrong with the file; empty: nothing."""
        self.plan = Plan(Journal())
        self._offset = 0
        self._inode = -1
        self._lock = threading.Lock()

    def update(self) -> None:
        """Read whole new lines."""
        with self._lock:
            try:
                with self.path.open("rb") as file:
                    self._read(file)
            except OSError:
                return

    def _read(self, file: Any) -> None:
        found = os.fstat(file.fileno())
        if found.st_ino != self._inode or found.st_size < self._offset:
            self._inode, self._offset = found.st_ino, 0
            self.events, self.plan, self.damage = [], Plan(Journal()), ""
        file.seek(self._offset)
        for line in file:
            if not line.endswith(b"\n") or self.damage:
                return
            try:
                event = Event.parse(line)
                self.plan.apply(event)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                self.damage = (
                    f"line {len(self.events) + 1} is damaged ({type(error).__name__}); later events are missing"
                )
                return
            self.events.append(event)
            self._offset += len(line)

    def asked(self, step: int) -> dict[str, float]:
        """The shares asked for at `step`, summing to 1; empty when the journal does not say."""
        with self._lock:
            try:
                weights = dict(self.plan.asked(step) or {})
            except (KeyError, TypeError, ValueError, AttributeError):
                return {}
        total = sum(weights.values())
        return {name: weight / total for name, weight in weights.items()} if total > 0 else {}


def shown(event: Event) -> dict[str, Any]:
    """An event as the page gets it."""
    data = {key: _short(value) for key, value in event.data.items() if key in SHOWN}
    if event.kind in ("source_added", "manifest", "grown") and isinstance(event.data.get("source"), dict):
        data["source"] = str(event.data["source"].get("name", ""))[:MOST_TEXT]
    return {"seq": event.seq, "time": event.time, "step": event.step, "kind": event.kind, "by": event.by, "data": data}


def _short(value: Any) -> Any:
    if isinstance(value, str):
        return value[:MOST_TEXT]
    if isinstance(value, dict):
        return {str(key)[:200]: _short(item) for key, item in list(value.items())[:1000]}
    if isinstance(value, list):
        return [_short(item) for item in value[:100]]
    return value
