"""A policy by itself, without a run: what it is told and what it wants."""

from collections.abc import Mapping
from typing import Any

from data_scheduler.policies import Feedback, Policy, make_policy
from data_scheduler.policies.context import Context, SourceSize

SIZES = {"a": SourceSize(80, 20.0), "b": SourceSize(400, 100.0), "c": SourceSize(4000, 1000.0)}
EQUAL = dict.fromkeys("abc", 1.0)


def context(**changes: Any) -> Context:
    known: dict[str, Any] = {
        "names": ("a", "b", "c"),
        "run_steps": 100,
        "horizon": 2,
        "held_out": frozenset("abc"),
        "size_of": lambda name: SIZES[name],
        "tokens_before": lambda step: 3 * step,
    }
    return Context(**known | changes)


def policy(kind: str, initial: Mapping[str, float] = EQUAL, **options: Any) -> Policy:
    return make_policy(kind, options, initial, context(names=tuple(initial)))


def shares(made: Policy, step: int = 0, *reports: Feedback) -> dict[str, float]:
    weights = made.weights(step, reports)
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def trained(
    step: int, losses: Mapping[str, float], drawn: Mapping[str, float] | None = None, tokens: int = 1024
) -> Feedback:
    return Feedback(step, losses, dict.fromkeys(losses, tokens), shares=drawn or {})
