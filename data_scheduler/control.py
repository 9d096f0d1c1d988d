"""What people ask of a live run's data, turned into events or refused.

    request ──► decide_… (checks, first step) ──► Decision ──► Scheduler.take on every rank ──► journal, plan

Deciding is done once, on the rank that writes the journal; the decision is then taken by all between the same two
steps. A decision about the data takes effect at `Scheduler.earliest_change` or later, so that no rank has begun to
prepare that step. Worked example: prefetch 2, step 100 is next; steps 100, 101 and 102 may be ready or in the making,
so a mixture set now begins at 103.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from data_scheduler.journal import Event, Journal, Kind
from data_scheduler.left_out import Part
from data_scheduler.mixture import ONE, quantize
from data_scheduler.order import Int64
from data_scheduler.plan import SETTINGS, Plan
from headrace.errors import ConfigError

UNDOABLE: tuple[Kind, ...] = ("mixture", "policy", "quarantine", *(kind for kind in SETTINGS if kind != "paused"))
"""Kinds of events that hold until something else is decided; `paused` has a command of its own to end it."""
MAX_STEP = 10**12


class RefusedError(ConfigError):
    """A command that cannot be carried out; nothing was changed."""


class Decision(NamedTuple):
    """An event that is to be journaled."""

    kind: Kind
    step: int
    """First step it applies to."""
    data: dict[str, Any]


def first_step(at: str | None, next_step: int, earliest: int) -> int:
    """The step that `at` names: "+N" counts from the next step, "N" is a step of the run, None is the earliest.

    Raises RefusedError when the step is past, or is being prepared already.
    """
    if at is None:
        return earliest
    number = int(at.removeprefix("+"))
    if at.startswith("+"):
        return max(earliest, next_step + number)
    if number < earliest:
        why = "is over" if number < next_step else "is prepared already"
        raise RefusedError(f"step {number} {why}; the earliest that can change is {earliest}")
    return number


def decide_mixture(names: Sequence[str], weights: Mapping[str, float], step: int, over: int) -> Decision:
    """Weights on any scale, as shares from `step` on, approached over `over` steps; sources not named get none."""
    try:
        shares = quantize(weights, names) / ONE
    except ConfigError as error:
        raise RefusedError(str(error)) from None
    data: dict[str, Any] = {"weights": dict(zip(names, shares.tolist(), strict=True))}
    return Decision("mixture", step, data | {"over": over} if over else data)


def decide_quarantine(names: Sequence[str], source: str, plan: Plan, step: int, part: Part | None = None) -> Decision:
    """Draw nothing from a source from `step` on, or nothing of a `part` that `left_out.check_part` found in it."""
    if source not in names:
        raise RefusedError(f"no source {source!r} (sources: {', '.join(names)})")
    if source in plan.quarantined(step):
        raise RefusedError(f"{source!r} is under quarantine already")
    if part is not None:
        return Decision("quarantine", step, {"source": source, **part._asdict()})
    return Decision("quarantine", step, {"source": source})


def decide_undo(journal: Journal, number: int, next_step: int, earliest: int) -> Decision:
    """Let event `number` hold no longer: what held before it does again."""
    if number >= len(journal.events):
        raise RefusedError(f"no event {number}; the journal has {len(journal.events)} events, counted from 0")
    event = journal.events[number]
    what = f"event {number} ({event.kind} by {event.by})"
    command = event.data.get("command")
    if command is None or not event.by.startswith("user:"):
        raise RefusedError(f"{what} was not asked for by a command; only such can be undone")
    if event.kind not in UNDOABLE:
        raise RefusedError(f"{what} cannot be undone; {_instead(event)}")
    if any(past.data.get("command_undone") == command for past in journal.of("undone")):
        raise RefusedError(f"{what} was undone before")
    step = next_step if event.kind in SETTINGS else earliest
    return Decision("undone", step, {"event": number, "command_undone": command})


def _instead(event: Event) -> str:
    return {
        "source_added": "set its weight to 0 or put it under quarantine",
        "paused": "use `resume`",
        "undone": "give the first command again",
    }.get(event.kind, "it has no lasting effect")


def check_something_left(journal: Journal, decision: Decision, by: str) -> None:
    """Raise RefusedError when a decision would leave a step without any source to draw from."""
    trial = Plan(Journal())
    for event in journal.events:
        trial.apply(event)
    trial.apply(Event(len(journal.events), 0.0, decision.step, decision.kind, decision.data, by))
    for step in sorted({decision.step, *(turn for turn in trial.turns() if turn > decision.step)}):
        # Before the first step nothing is decided yet; a policy begins with what is configured.
        out, weights = trial.quarantined(step), trial.mixture.at(step) or trial.chosen(step).initial
        # A policy that wants nothing else is helped by the configured weights; what a person wants is never bent.
        wanted = math.fsum(weight for name, weight in weights.items() if name not in out)
        person = trial.person_decides(step) is not None
        if (person and not wanted) or not trial.without_quarantined(weights, step):
            raise RefusedError(f"at step {step} no source with a weight would be left that is not under quarantine")


def settle(owed: Int64, shares: Int64, out: Sequence[int]) -> Int64:
    """`owed` (int64[sources], sums to 0) with what the sources `out` were owed handed to the one with most shares.

    A source that is owed part of a sequence could be drawn once more to make up for it, whatever its share.
    """
    settled = owed.copy()
    left = int(settled[list(out)].sum())
    settled[list(out)] = 0
    settled[int(shares.argmax())] += left
    return settled
