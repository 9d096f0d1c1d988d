"""Values that change with the step, as the journal tells them: the newest decision at or before a step holds for it.

Undoing never rewrites: an entry that was undone at step U held until U − 1; from U on the one before it holds again.

    put(0, a)   put(100, b, command="x")   undo("x", 300)       at(99) = a   at(299) = b   at(300) = a
"""

import math
import threading
from bisect import bisect_right, insort
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, order=True)
class Entry:
    """One decision."""

    step: int
    """First step it holds for."""
    order: int
    """Number of its event; of two at the same step the later holds."""
    value: Any = field(compare=False)
    by: str = field(compare=False)
    command: str | None = field(compare=False, default=None)
    """The command that asked for it, when a person did."""
    over: int = field(compare=False, default=0)
    """Steps of a linear ramp from what held before; 0: at once."""

    @property
    def by_person(self) -> bool:
        """Whether a person decided it: resuming leaves it in place."""
        return self.by.startswith("user:")


class Timeline:
    """Step-stamped values. The training thread puts while the loader's thread looks."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._undone: dict[str, int] = {}
        """command → first step it no longer holds for"""
        self._voided: list[tuple[int, int, int]] = []
        """(first, stop, from): what policies decided for the steps [first, stop) does not hold from `from` on."""
        self._lock = threading.Lock()

    def put(self, entry: Entry) -> None:
        """Let `entry` hold from its step on."""
        with self._lock:
            insort(self._entries, entry)

    def newest(self, step: int) -> Entry | None:
        """The entry in force at `step`, None before the first."""
        with self._lock:
            index = bisect_right(self._entries, step, key=lambda entry: entry.step)
            while index and self._is_over(self._entries[index - 1], step):
                index -= 1
            return self._entries[index - 1] if index else None

    def at(self, step: int) -> Any:
        """The value in force at `step`, None before the first entry."""
        entry = self.newest(step)
        return None if entry is None else entry.value

    def after(self, step: int) -> int | None:
        """The first step after `step` with an entry."""
        with self._lock:
            index = bisect_right(self._entries, step, key=lambda entry: entry.step)
            return self._entries[index].step if index < len(self._entries) else None

    @property
    def entries(self) -> list[Entry]:
        """All entries, also those that were undone."""
        with self._lock:
            return list(self._entries)

    def turns(self, stop: int | None = None) -> list[int]:
        """Steps at which the value may begin to change another way, ascending: between two it is constant or a ramp.

        With `stop`, every step of a ramp is one, up to there.
        """
        with self._lock:
            turns = set(self._undone.values()) | {begin for _, _, begin in self._voided}
            for entry in self._entries:
                end = entry.step + max(1, entry.over)
                turns.update((entry.step, end - 1) if stop is None else range(entry.step, min(end, stop)))
            return sorted(turn for turn in turns if stop is None or turn < stop)

    def steady_until(self, step: int) -> float:
        """The first step after `step` at which the value may be another; infinite when it stays as things are."""
        with self._lock:
            changes = {*self._undone.values(), *(begin for _, _, begin in self._voided)}
            for entry in self._entries:
                changes.add(entry.step)
                if entry.step <= step < entry.step + entry.over:
                    return step + 1
            return min((change for change in changes if change > step), default=math.inf)

    def take_back(self, step: int) -> None:
        """Remove entries from `step` on that no person made."""
        with self._lock:
            self._entries = [entry for entry in self._entries if entry.step < step or entry.by_person]

    def undo(self, command: str, step: int) -> None:
        """Let what `command` asked for hold no longer from `step` on."""
        with self._lock:
            self._undone[command] = min(step, self._undone.get(command, step))

    def void(self, first: int, stop: int, step: int) -> None:
        """Let what policies decided for the steps [first, stop) hold no longer from `step` on."""
        with self._lock:
            self._voided.append((first, stop, step))

    def _is_over(self, entry: Entry, step: int) -> bool:
        if entry.command is not None and step >= self._undone.get(entry.command, step + 1):
            return True
        return not entry.by_person and any(a <= entry.step < b and step >= c for a, b, c in self._voided)


class MixtureTimeline(Timeline):
    """Weights by source (shares, when the journal has them); an entry with `over` is approached in equal steps."""

    def at(self, step: int) -> Mapping[str, float] | None:
        """The weights in force at `step`, None before the first entry.

        A ramp over n steps that begins at step S gives at S + k the weights before it plus (k + 1)/n of the difference,
        so S + n − 1 is the first step with the new weights. What held before it is what held at S − 1, also when that
        is undone later.
        """
        ramps: list[tuple[Entry, int]] = []  # a ramp may begin inside another
        entry = self.newest(step)
        while entry is not None and step < entry.step + entry.over - 1:
            ramps.append((entry, step))
            step = entry.step - 1
            entry = self.newest(step)
        weights: Mapping[str, float] | None = None if entry is None else entry.value
        for ramp, at in reversed(ramps):
            goal: Mapping[str, float] = ramp.value
            begin, part = goal if weights is None else weights, (at - ramp.step + 1) / ramp.over
            names = [*begin, *(name for name in goal if name not in begin)]
            weights = {
                name: begin.get(name, 0.0) + (goal.get(name, 0.0) - begin.get(name, 0.0)) * part for name in names
            }
        return weights
