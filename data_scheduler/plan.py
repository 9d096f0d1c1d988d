"""What the journal says about a step: its mixture and its shape, who decides, and what people asked of the run.

Reading rule: events are taken in file order. `resumed` at step R takes back what policies and the configuration had
decided for steps from R on (the resumed run decides them again, identically unless its configuration changed); what a
person decided stays.

Who decides the mixture of a step: a mixture that a person set holds until it is undone, or until a person or a changed
configuration chooses a policy. Meanwhile the policy goes on listening.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from data_scheduler.journal import Event, Journal
from data_scheduler.left_out import LeftOut, Part
from data_scheduler.timeline import Entry, MixtureTimeline, Timeline

Setting = Literal["lr_scale", "eval_every", "stop_at", "paused"]
SETTINGS: Final = get_args(Setting)
"""Events about the trainer. They do not shape the data; they are here so that a resumed run finds them."""


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
    leaves_out: Part | None = None
    """A file or record that is left out from here on, in the place of new files."""
    command: str = ""
    """That asked for it; without `leaves_out` the one that is undone."""


@dataclass(frozen=True)
class Chosen:
    """The policy of a step."""

    kind: str
    options: Mapping[str, Any]
    initial: Mapping[str, float]
    """Weights of the sources that have entered the run, in the order of the run's sources."""
    order: int
    """Number of the event that chose it; -1: the configuration the run began with."""
    by_person: bool

    def goes_on_from(self, before: "Chosen") -> bool:
        """Whether it takes over the state of the policy before it: the same one with other weights or more sources."""
        if self.order == before.order:
            return True
        return not self.by_person and (self.kind, self.options) == (before.kind, before.options)


def _no_files(source: str) -> dict[str, Any]:
    """A manifest of nothing, as it is journaled."""
    return {"source": source, "folders": []}


class Plan:
    """Mixture weights and batch shape as functions of the step, kept up to date as events are appended."""

    def __init__(self, journal: Journal) -> None:
        self.mixture = MixtureTimeline()
        """name → weight"""
        self.people = Timeline()
        """Of the mixtures those that people set."""
        self.policy = Timeline()
        """{"kind", "options"} of policies chosen after the start; of the configuration's also {"weights"}"""
        self.shape = Timeline()
        """{"seq_len", "global_batch_size"}, and in a stage {"stage"}: its number"""
        self.limits = Timeline()
        """name → max_epochs, None for no limit"""
        self.settings: dict[str, Timeline] = {kind: Timeline() for kind in SETTINGS}
        """What people asked of the trainer, by kind of event."""
        self.grown: dict[str, list[Growth]] = {}
        """Files that joined a source after it entered the run, in the order of their joining."""
        self.capped: dict[str, list[Cap]] = {}
        """When every lane of a source had reached its limit; again after files joined or the limit was raised."""
        self.added: dict[str, tuple[int, float]] = {}
        """Sources that a person added to the live run: (first step, weight)."""
        self._began_with: dict[str, Any] = {"kind": "static", "options": {}, "weights": {}}
        self._quarantines: dict[str, list[tuple[int, str]]] = {}
        """source → (first step, command)"""
        self._undone: dict[str, int] = {}
        self.version = 0
        """Events taken into account."""
        for event in journal.events:
            self.apply(event)

    def steady_until(self, step: int) -> float:
        """The first step after `step` for which the plan may say something else than for `step`, as things are."""
        timelines = (self.mixture, self.people, self.policy, self.shape, self.limits)
        changes = [
            *(first for all_of in self._quarantines.values() for first, _ in all_of),
            *self._undone.values(),
            *(first for first, _ in self.added.values()),
            *(growth.step for all_of in self.grown.values() for growth in all_of),
            *(cap.step for all_of in self.capped.values() for cap in all_of),
        ]
        return min(
            *(timeline.steady_until(step) for timeline in timelines),
            min((change for change in changes if change > step), default=math.inf),
        )

    def apply(self, event: Event) -> None:
        """Take one event into account."""
        self._apply(event)
        self.version += 1

    def _apply(self, event: Event) -> None:
        data = event.data
        command = data.get("command")
        if event.kind == "run_started" and "data" in data:
            policy, sources = data["data"]["policy"], data["data"]["sources"]
            weights = {source["name"]: source["weight"] for source in sources}
            self._began_with = {"kind": policy["kind"], "options": policy["options"], "weights": weights}
        elif event.kind == "mixture":
            entry = Entry(event.step, event.seq, data["weights"], event.by, command, data.get("over", 0))
            self.mixture.put(entry)
            if entry.by_person:
                self.people.put(entry)
        elif event.kind == "policy":
            # Stages are journaled again at every resumption; what people decided for the step where one begins holds.
            order = -1 - event.seq if "stage" in data else event.seq
            self.policy.put(Entry(event.step, order, data, event.by, command))
        elif event.kind == "stage":
            self.shape.put(Entry(event.step, event.seq, data, event.by))
        elif event.kind == "limits":
            self.limits.put(Entry(event.step, event.seq, data["max_epochs"], event.by))
        elif event.kind in SETTINGS:
            self.settings[event.kind].put(Entry(event.step, event.seq, data["value"], event.by, command))
        elif event.kind == "quarantine" and data.get("file") is not None:
            within = data.get("within")
            part = Part(data["file"], data.get("record"), within and (within[0], within[1]))
            self._put(data["source"], Growth(event.step, -1, _no_files(data["source"]), part, data.get("command", "")))
        elif event.kind == "quarantine":
            self._quarantines = self._quarantines | {
                data["source"]: [*self._quarantines.get(data["source"], []), (event.step, data.get("command", ""))]
            }
        elif event.kind == "source_added" and event.by.startswith("user:"):
            self.added[data["source"]["name"]] = (event.step, data["source"]["weight"])
        elif event.kind == "grown":
            files = dict(data)
            self._put(data["source"], Growth(event.step, files.pop("reported"), files))
        elif event.kind == "capped":
            cap = Cap(**data, step=event.step)
            self.capped[cap.source] = [*self.capped.get(cap.source, []), cap]
        elif event.kind == "undone":
            self._undo(data["command_undone"], event.step)
        elif event.kind in ("resumed", "rollback"):
            self._take_back(event.step)

    def is_capped(self, source: str, step: int) -> bool:
        """Whether the source gives nothing at `step` because it has reached the limit that holds there."""
        at_step = ((self.limits.at(step) or {}).get(source), self.generations(source, step))
        caps = self.capped.get(source, [])
        return any(cap.step <= step and (cap.max_epochs, cap.generations) == at_step for cap in caps)

    def quarantined(self, step: int) -> frozenset[str]:
        """Sources that people have taken out of `step`."""
        quarantines, undone = self._quarantines, self._undone
        if not quarantines:
            return frozenset()
        return frozenset(
            name
            for name, all_of in quarantines.items()
            if any(first <= step < undone.get(command, step + 1) for first, command in all_of)
        )

    def left_out(self, source: str) -> list[LeftOut]:
        """The files and records that people have taken out of a source, and in which of its generations."""
        grown = self.grown.get(source, [])
        ends = {growth.command: number for number, growth in enumerate(grown, 2) if growth.leaves_out is None}
        return [
            LeftOut(growth.leaves_out, number, ends.get(growth.command))
            for number, growth in enumerate(grown, 2)
            if growth.leaves_out is not None
        ]

    def parts_out(self, source: str, step: int) -> list[Part]:
        """The files and records of a source that are under quarantine at `step`."""
        return [out.part for out in self.left_out(source) if out.holds(self.generations(source, step))]

    def asked(self, step: int) -> Mapping[str, float] | None:
        """The weights of a step without quarantined sources; None before the first mixture."""
        weights = self.mixture.at(step)
        return weights and self.without_quarantined(weights, step)

    def without_quarantined(self, weights: Mapping[str, float], step: int) -> Mapping[str, float]:
        """`weights` of the sources that are not under quarantine at `step`; where they have none, what the
        configuration gives these. Empty when every source is under quarantine."""
        out = self.quarantined(step)
        if not out:
            return weights
        left = {name: weight for name, weight in weights.items() if name not in out}
        if not any(left.values()):
            left = {name: weight for name, weight in self.chosen(step).initial.items() if name not in out}
        return left if any(left.values()) else dict.fromkeys(left, 1.0)

    def turns(self, stop: int | None = None) -> list[int]:
        """Steps at which what is asked of the sources, or the batch shape, may begin to change another way; with `stop`
        every step below it at which it may change."""
        quarantines = [first for all_of in self._quarantines.values() for first, _ in all_of]
        turns = {*self.mixture.turns(stop), *self.shape.turns(stop), *quarantines, *self._undone.values()}
        return sorted(turn for turn in turns if stop is None or turn < stop)

    def generations(self, source: str, step: int) -> int:
        """How often the source has got files by `step`: 1 and its growths so far."""
        return 1 + sum(growth.step <= step for growth in self.grown.get(source, []))

    def person_decides(self, step: int) -> Entry | None:
        """The mixture that a person set and that holds at `step`; None: the policy decides."""
        person, policy = self.people.newest(step), self.policy.newest(step)
        return person if person is not None and (policy is None or person > policy) else None

    def deciding(self, step: int) -> int:
        """Number of the event that says who decides the mixture of `step`: a person's own, or the choice of a policy;
        -1: the policy the run began with."""
        entry = self.person_decides(step) or self.policy.newest(step)
        return -1 if entry is None else entry.order

    def configured(self, step: int) -> dict[str, Any]:
        """What the configuration last said about the mixture, by `step`: {"kind", "options", "weights"}."""
        chosen = [entry.value for entry in self.policy.entries if entry.step <= step and not entry.by_person]
        found = chosen[-1] if chosen else self._began_with
        added = {name: weight for name, (_, weight) in self.added.items() if name not in found["weights"]}
        return {"kind": found["kind"], "options": found["options"], "weights": found["weights"] | added}

    def chosen(self, step: int) -> Chosen:
        """The policy of `step`, whether or not it decides."""
        configured, entry = self.configured(step), self.policy.newest(step)
        initial = {
            name: weight
            for name, weight in configured["weights"].items()
            if name not in self.added or self.added[name][0] <= step
        }
        if entry is None:
            return Chosen(configured["kind"], configured["options"], initial, -1, False)
        return Chosen(entry.value["kind"], entry.value["options"], initial, entry.order, entry.by_person)

    def _undo(self, command: str, step: int) -> None:
        for policy in [entry for entry in self.policy.entries if entry.command == command]:
            following = self.policy.after(policy.step)
            self.mixture.void(policy.step, step if following is None else min(step, following), step)
        for timeline in (self.mixture, self.people, self.policy, *self.settings.values()):
            timeline.undo(command, step)
        for source, grown in list(self.grown.items()):
            if any(growth.leaves_out is not None and growth.command == command for growth in grown):
                self._put(source, Growth(step, -1, _no_files(source), None, command))
        self._undone = self._undone | {command: min(step, self._undone.get(command, step))}

    def _put(self, source: str, growth: Growth) -> None:
        """Put a generation where it belongs: what is decided now may begin before files that were found earlier do."""
        grown = sorted([*self.grown.get(source, []), growth], key=lambda one: one.step)
        self.grown = self.grown | {source: grown}

    def _take_back(self, step: int) -> None:
        for timeline in (self.mixture, self.people, self.policy, self.shape, self.limits):
            timeline.take_back(step)
        # Caps and growth follow from what was seen at a trained step; before the resumption it stays trained.
        self.grown = {
            name: [growth for growth in all_of if growth.reported < step] for name, all_of in self.grown.items()
        }
        self.capped = {name: [cap for cap in caps if cap.reported < step] for name, caps in self.capped.items()}
