"""Arithmetic on shares. `math` only: numpy's `exp` may differ in the last bit between CPUs, and ranks must agree."""

import math
from collections.abc import Mapping
from typing import Final

MOST_LOSS: Final = 1e6
"""Nats per token; a uniform guess over a million tokens has 14. NaN and infinities are past it too."""


def normalized(weights: Mapping[str, float]) -> dict[str, float]:
    """Weights as shares that sum to 1."""
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def switched_on(initial: Mapping[str, float]) -> list[str]:
    """Sources with a configured weight above 0: the only ones that policies that decide for themselves draw from."""
    return [name for name, weight in initial.items() if weight > 0]


def softmax(scores: Mapping[str, float], prior: Mapping[str, float] | None = None) -> dict[str, float]:
    """prior · exp(score), as shares; prior uniform when None."""
    most = max(scores.values())
    weights = {name: math.exp(score - most) for name, score in scores.items()}
    if prior is not None:
        # The least positive number keeps a source that lost by e⁷⁰⁰ from making a sum of zero.
        weights = {name: max(weight * prior[name], 5e-324) for name, weight in weights.items()}
    return normalized(weights)


def floored(shares: Mapping[str, float], least: float) -> dict[str, float]:
    """Shares none of which is below `least`; those above give what is missing, in proportion to what they have.

    least: at most 1/number of sources.
    """
    low: set[str] = set()
    while True:
        rest = 1.0 - least * len(low)
        above = sum(share for name, share in shares.items() if name not in low)
        found = {name for name, share in shares.items() if name not in low and share * rest < least * above}
        if not found or len(low) + len(found) == len(shares):
            break
        low |= found
    if len(low) + len(found) == len(shares):
        return dict.fromkeys(shares, 1.0 / len(shares))
    return {name: least if name in low else share * rest / above for name, share in shares.items()}


def finite(losses: Mapping[str, float]) -> dict[str, float]:
    """The losses that are numbers a model can have."""
    return {name: loss for name, loss in losses.items() if abs(loss) <= MOST_LOSS}
