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


@dataclass(frozen=True)
class Cap:
    """The end of a source."""

    source: str
    max_epochs: int
    """The limit its lanes reached."""
    generations: int
    """How often the source had got files by then."""
    reported: int
    """Step in which the last lane was found to be through."""
    step: int
    """First step without the source."""


@dataclass(frozen=True)
class Growth:
    """New files of a source."""

    step: int
    """First step whose lanes may reach them."""
    reported: int
    """Step after which they were found."""
    manifest: dict[str, Any]
    """The files, as a manifest is journaled."""


class Plan:
    """Mixture weights and batch shape as functions of the step, kept up to date as events are appended."""

    def __init__(self, journal: Journal) -> None:
        self.mixture = Timeline()
        """name → weight"""
        self.shape = Timeline()
        """{"seq_len", "global_batch_size"}"""
        self.limits = Timeline()
        """name → max_epochs, None for no limit"""
        self.grown: dict[str, list[Growth]] = {}
        """Files that joined a source after it entered the run, in the order of their joining."""
        self.capped: dict[str, list[Cap]] = {}
        """When every lane of a source had reached its limit; again after files joined or the limit was raised."""
        for event in journal.events:
            self.apply(event)

    def apply(self, event: Event) -> None:
        """Take one event into account."""
        if event.kind == "mixture":
            self.mixture.put(event.step, event.data["weights"], event.by)
        elif event.kind == "stage":
            self.shape.put(event.step, event.data, event.by)
        elif event.kind == "limits":
            self.limits.put(event.step, event.data["max_epochs"], event.by)
        elif event.kind == "grown":
            data = dict(event.data)
            growth = Growth(event.step, data.pop("reported"), data)
            self.grown[data["source"]] = [*self.grown.get(data["source"], []), growth]
        elif event.kind == "capped":
            cap = Cap(**event.data, step=event.step)
            self.capped[cap.source] = [*self.capped.get(cap.source, []), cap]
        elif event.kind in ("resumed", "rollback"):
            for timeline in (self.mixture, self.shape, self.limits):
                timeline.take_back(event.step)
            # Caps and growth follow from what was seen at a trained step; before the resumption it stays trained.
            self.grown = {
                name: [growth for growth in all_of if growth.reported < event.step]
                for name, all_of in self.grown.items()
            }
            self.capped = {
                name: [cap for cap in caps if cap.reported < event.step] for name, caps in self.capped.items()
            }

    def is_capped(self, source: str, step: int) -> bool:
        """Whether the source gives nothing at `step` because it has reached the limit that holds there."""
        at_step = ((self.limits.at(step) or {}).get(source), self.generations(source, step))
        caps = self.capped.get(source, [])
        return any(cap.step <= step and (cap.max_epochs, cap.generations) == at_step for cap in caps)

    def generations(self, source: str, step: int) -> int:
        """How often the source has got files by `step`: 1 and its growths so far."""
        return 1 + sum(growth.step <= step for growth in self.grown.get(source, []))
