"""What the journal says about a step: its mixture and its shape.

Reading rule: events are taken in file order. `resumed` at step R takes back what policies and the configuration had
decided for steps from R on (the resumed run decides them again, identically unless its configuration changed); what a
person decided stays.
"""

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any

from data_scheduler.journal import Event, Journal


@dataclass
class Timeline:
    """Step-stamped values; the newest entry at or before a step holds for it."""

    steps: list[int] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)
    by: list[str] = field(default_factory=list)

    def put(self, step: int, value: Any, by: str) -> None:
        """Set `value` from `step` on, replacing an entry at the same step."""
        at = bisect_right(self.steps, step)
        if at and self.steps[at - 1] == step:
            self.values[at - 1], self.by[at - 1] = value, by
        else:
            self.steps.insert(at, step)
            self.values.insert(at, value)
            self.by.insert(at, by)

    def at(self, step: int) -> Any:
        """The value in force at `step`, None before the first entry."""
        index = bisect_right(self.steps, step)
        return self.values[index - 1] if index else None

    def decided(self, step: int) -> bool:
        """Whether an entry stands at exactly this step."""
        index = bisect_right(self.steps, step)
        return bool(index) and self.steps[index - 1] == step

    def take_back(self, step: int) -> None:
        """Remove entries from `step` on that no person made."""
        kept = [
            (at, value, by)
            for at, value, by in zip(self.steps, self.values, self.by, strict=True)
            if at < step or by.startswith("user:")
        ]
        self.steps = [at for at, _, _ in kept]
        self.values = [value for _, value, _ in kept]
        self.by = [by for _, _, by in kept]


class Plan:
    """Mixture weights and batch shape as functions of the step, kept up to date as events are appended."""

    def __init__(self, journal: Journal) -> None:
        self.mixture = Timeline()
        """name → weight"""
        self.shape = Timeline()
        """{"seq_len", "global_batch_size"}"""
        for event in journal.events:
            self.apply(event)

    def apply(self, event: Event) -> None:
        """Take one event into account."""
        if event.kind == "mixture":
            self.mixture.put(event.step, event.data["weights"], event.by)
        elif event.kind == "stage":
            self.shape.put(event.step, event.data, event.by)
        elif event.kind in ("resumed", "rollback"):
            self.mixture.take_back(event.step)
            self.shape.take_back(event.step)
