"""A run's journal as it grows, for reading only; damage is told, never mended."""

import io
import math
import os
import threading
from pathlib import Path
from typing import Any, Final

from data_scheduler.journal import Event, Journal
from data_scheduler.plan import Plan
from pretrain.monitor.run_files import mark_before, open_plain

LONGEST_LINE: Final = 256 << 20
"""Bytes; the manifest of a million files has some 200 a file. In a file of zeros one line has no end."""
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
        """What is wrong with the file's content; empty: nothing."""
        self.problem = ""
        """Why the file cannot be read, though there is one; empty: it can."""
        self.plan = Plan(Journal())
        self.generation = 0
        """How often the file was read anew from its beginning."""
        self._offset = 0
        self._inode = -1
        self._mark = b""
        self._lock = threading.Lock()

    @property
    def version(self) -> str:
        """Changes when there is something new."""
        return f"{self.generation}.{len(self.events)}"

    def update(self) -> None:
        """Read whole new lines."""
        with self._lock:
            try:
                with open_plain(self.path) as raw, io.BufferedReader(raw) as file:
                    self._read(file)
                self.problem = ""
            except FileNotFoundError:
                self.problem = ""
            except OSError as error:  # a folder, a link, another user's
                self.problem = error.strerror or type(error).__name__

    def _read(self, file: Any) -> None:
        found = os.fstat(file.fileno())
        is_same = found.st_ino == self._inode and found.st_size >= self._offset
        if not is_same or mark_before(file, self._offset) != self._mark:
            self._inode, self._offset, self._mark = found.st_ino, 0, mark_before(file, 0)
            self.events, self.plan, self.damage = [], Plan(Journal()), ""
            self.generation += 1
        begin = self._offset
        file.seek(begin)
        while not self.damage and (line := file.readline(LONGEST_LINE)):
            whole = line.endswith(b"\n")
            if not whole and len(line) < LONGEST_LINE:
                break
            try:
                event = _checked(Event.parse(line if whole else b""))
                self.plan.apply(event)
            except Exception as error:  # the file may be anybody's, and the other runs are to be seen all the same
                self.damage = (
                    f"journal.jsonl: line {len(self.events) + 1} is damaged ({type(error).__name__}); later events are "
                    "missing"
                )
                break
            self.events.append(event)
            self._offset += len(line)
        if self._offset != begin:
            self._mark = mark_before(file, self._offset)

    def asked(self, step: int) -> dict[str, float]:
        """The shares asked for at `step`, summing to 1; empty when the journal does not say."""
        with self._lock:
            try:
                weights = dict(self.plan.asked(step) or {})
                total = sum(weights.values())
                return {name: weight / total for name, weight in weights.items()} if total > 0 else {}
            except (KeyError, TypeError, ValueError, AttributeError):
                return {}

    def decided(self, step: int) -> dict[str, Any]:
        """Who decides the mixture at `step` (`decided_by`), and the factor on the learning rate (`lr_scale`)."""
        with self._lock:
            person, chosen = self.plan.person_decides(step), self.plan.chosen(step)
            return {
                "decided_by": "person" if person else f"policy:{chosen.kind}",
                "lr_scale": self.plan.settings["lr_scale"].at(step) or 1.0,
            }


def _checked(event: Event) -> Event:
    """The event, when its fields are what they should be; a checksum says only that they are what was written."""
    is_time = type(event.time) in (int, float) and math.isfinite(event.time)
    is_step = type(event.step) is int and -1 <= event.step < 1 << 53
    if not (is_time and is_step and type(event.seq) is int and isinstance(event.by, str)):
        raise ValueError("a field of another type")
    return event


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
