"""Guard-rails: what holds whatever a policy wants. One wrapper for all policies, the users' own included.

    reports ──► [losses that are no numbers, or a spike: freeze] ──► policy ──► wanted shares
            ──► [every `update_every` steps: the nearest shares within all bounds] ──► mixture

Bounds: a source's least and largest share, and its largest change at once. They are one box around the shares in force,
so the nearest shares within it satisfy all of them together (`simplex.py`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from data_scheduler.config import DataConfig, GuardConfig, share_bounds
from data_scheduler.mixture import ONE, quantize
from data_scheduler.policies import Feedback, Policy, make_policy
from data_scheduler.policies.context import Context
from data_scheduler.policies.simplex import project

MEMORY = 0.02
"""Weight of a report in the running mean that a spike is measured against: a mean over some fifty."""
LEAST_REPORTS = 20
"""Reports before a spike can be told from a beginning."""


class Note(NamedTuple):
    """Something for the journal that shapes no step."""

    kind: Literal["frozen", "proposed"]
    data: dict[str, Any]


def open_policy(
    config: DataConfig,
    context: Context,
    kind: str | None = None,
    options: Mapping[str, Any] | None = None,
    initial: Mapping[str, float] | None = None,
) -> Policy:
    """The configured policy, or the one given, behind the configured guard-rails. Raises ConfigError as `make_policy`.

    initial: weights of the sources that have entered the run, all by default. Without a bound that can bind, a policy
    that does not listen is returned as it is.
    """
    kind = config.policy.kind if kind is None else kind
    options = config.policy.options if options is None else options
    initial = {source.name: source.weight for source in config.sources} if initial is None else initial
    policy = make_policy(kind, options, initial, context)
    guard = config.policy.guard
    bounds = zip((source.name for source in config.sources), *share_bounds(config, initial), strict=True)
    own = {name: (least, most) for name, least, most in bounds if name in initial}
    low, high = [own[name][0] for name in initial], [own[name][1] for name in initial]
    if sum(high) < ONE:  # the others have yet to enter; what these must give for them until then is no bound
        high = [ONE] * len(high)
    bounded = any(low) or any(most < ONE for most in high) or guard.max_change is not None or guard.update_every > 1
    if not (policy.uses_feedback or bounded or config.policy.dry_run):
        return policy
    return Guard(policy, initial, guard, low, high, kind=kind, dry_run=config.policy.dry_run)


class Guard:
    """A policy within bounds; itself a policy."""

    _last: list[int]
    _wanted: dict[str, float]
    _moving: bool
    _frozen_until: int
    _mean: float
    _reports: int
    _given: dict[str, float]

    def __init__(
        self,
        policy: Policy,
        initial: Mapping[str, float],
        config: GuardConfig,
        low: Sequence[int],
        high: Sequence[int],
        *,
        kind: str = "",
        dry_run: bool = False,
    ) -> None:
        """low, high: bounds of the sources of `initial`, in its order, in units of 1/ONE; they leave room.

        kind: the policy's name; a state saved under another one is that of another policy, which begins anew.
        With `dry_run` the weights stay the configured ones, and what would have been is noted.
        """
        self.uses_feedback = policy.uses_feedback
        self._policy, self._config, self._kind, self._dry_run = policy, config, kind, dry_run
        self._initial, self._names = dict(initial), list(initial)
        self._low, self._high = list(low), list(high)
        self._change = None if config.max_change is None else max(1, int(config.max_change * ONE))
        self._notes: list[Note] = []
        self.load_state_dict({})

    def wants_validation(self, step: int) -> bool:
        """What the policy inside says."""
        wants = getattr(self._policy, "wants_validation", None)
        return wants is not None and bool(wants(step))

    def weights(self, step: int, feedback: Sequence[Feedback]) -> Mapping[str, float]:
        """The policy's weights within all bounds, as shares that are whole multiples of 1/ONE."""
        told = [self._heard(step, report) for report in feedback]
        wanted = self._policy.weights(step, told)
        held = bool(self._last) and (step < self._frozen_until or step % self._config.update_every != 0)
        if not held and (wanted != self._wanted or self._moving):
            self._move(step, wanted)
        if self._dry_run:
            return self._initial
        return self._given

    def _move(self, step: int, wanted: Mapping[str, float]) -> None:
        """Go as far towards `wanted` as the bounds let."""
        target = quantize(wanted, self._names).tolist()
        low, high, before = self._low, self._high, self._last
        if before and self._change is not None:
            # Bounds may have been changed, or a source added, since these shares were given.
            before = project(before, low, high)
            low = [max(least, share - self._change) for least, share in zip(low, before, strict=True)]
            high = [min(most, share + self._change) for most, share in zip(high, before, strict=True)]
        self._last = project(target, low, high)
        self._wanted = dict(wanted)
        # Towards a target that one change could not reach more steps are taken, though the policy repeats itself.
        self._moving = self._change is not None and self._last != project(target, self._low, self._high)
        self._given = self._as_weights()
        if self._dry_run and self._last != before:
            self._notes.append(Note("proposed", {"weights": self._given}))

    def _heard(self, step: int, report: Feedback) -> Feedback:
        """A report as the policy may hear it; notices what freezes."""
        losses = {**report.source_loss}
        bad = [name for name, loss in losses.items() if not math.isfinite(loss)]
        why = None
        if bad and self._config.freeze_on_nan:
            why = f"loss of {', '.join(bad)} is not a number"
        mean, tokens = 0.0, sum(report.source_tokens.get(name, 0) for name in losses if name not in bad)
        if tokens > 0 and self._config.spike_factor is not None:
            mean = sum(loss * report.source_tokens.get(n, 0) for n, loss in losses.items() if n not in bad) / tokens
            most = self._config.spike_factor * self._mean
            if self._reports >= LEAST_REPORTS and mean > most:
                why = why or f"loss {mean:.4g} is a spike: the mean was {self._mean:.4g}"
                mean = most  # a lasting rise must not freeze for ever
            self._mean = mean if self._reports == 0 else (1 - MEMORY) * self._mean + MEMORY * mean
            self._reports += 1
        if why is not None:
            until = step + self._config.freeze_steps
            # One note a freeze, not one a report: a spike is many bad reports in a row.
            if step >= self._frozen_until:
                self._notes.append(Note("frozen", {"until": until, "why": why, "reported": report.step}))
            self._frozen_until = until
        if step < self._frozen_until:
            return replace(report, source_loss={}, validation_loss={})  # tokens go on being counted
        good = {name: loss for name, loss in report.validation_loss.items() if math.isfinite(loss)}
        return replace(report, source_loss={n: x for n, x in losses.items() if n not in bad}, validation_loss=good)

    def take_notes(self) -> list[Note]:
        """What happened since the last call."""
        notes, self._notes = self._notes, []
        return notes

    def state_dict(self) -> dict[str, Any]:
        """The shares in force, the freeze, the running mean, and the policy's own state."""
        return {
            "guard": {
                "kind": self._kind,
                "sources": self._names,
                "last": self._last,
                "wanted": self._wanted,
                "moving": self._moving,
                "frozen_until": self._frozen_until,
                "mean": self._mean,
                "reports": self._reports,
            },
            "policy": self._policy.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state, also one of the policy without guard-rails."""
        guard = state.get("guard", {})
        known = dict(zip(guard.get("sources", []), guard.get("last", []), strict=True)) if guard.get("last") else {}
        self._last = [int(known.get(name, 0)) for name in self._names] if known else []
        self._wanted = dict(guard.get("wanted", {}))
        # Bounds and sources of the configuration may be others now.
        same = bool(known) and list(known) == self._names and project(self._last, self._low, self._high) == self._last
        own = guard.get("kind", self._kind) == self._kind
        self._moving = bool(guard.get("moving", False)) or not same or not own
        self._frozen_until = int(guard.get("frozen_until", 0))
        self._mean = float(guard.get("mean", 0.0))
        self._reports = int(guard.get("reports", 0))
        self._notes = []
        self._given = self._as_weights()
        inner = state.get("policy", {}) if "guard" in state else state
        self._policy.load_state_dict(inner if own else {})

    def _as_weights(self) -> dict[str, float]:
        return {name: share / ONE for name, share in zip(self._names, self._last, strict=True)} if self._last else {}
