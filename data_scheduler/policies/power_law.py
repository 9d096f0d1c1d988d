"""Fit of L(n) = ε + β·n^(−α) to a loss curve.

For a given α the law is linear in ε and β, so a fit is a search over α alone: 24 values, then twice 11 around the best.
No gradient, no starting point, no seed. Robust as in Hoffmann et al. (arXiv 2203.15556, equation 3): Huber's loss with
δ = 10⁻³ on the relative error, by iteratively reweighted least squares. (They and ADO take the difference of
logarithms; up to the square of a relative error that is the same, and it needs no logarithm, whose last bit numpy
computes differently on different CPUs, where ranks must agree.)
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
HUBER = 1e-3
ROUNDS = 5
"""Of reweighting; after four the residuals of a fit hardly change."""
LEAST_EXPONENT = 0.01
LEAST_LOSS = 1e-9
"""Losses that are fitted are above this: relative errors need something to be relative to."""


class PowerLaw(NamedTuple):
    """L(n) = floor + scale · n^(−exponent)."""

    floor: float
    scale: float
    exponent: float

    def at(self, tokens: float) -> float:
        """The loss after `tokens`."""
        return self.floor + self.scale * math.exp(-self.exponent * math.log(tokens))

    def slope(self, tokens: float) -> float:
        """dL/dn = −α·(L(n) − ε)/n = −α·β·n^(−α−1), equation 2 of ADO (arXiv 2410.11820)."""
        return -self.exponent * self.scale * math.exp(-(self.exponent + 1) * math.log(tokens))


def fit(tokens: Sequence[float], losses: Sequence[float], most_exponent: float = 0.8) -> PowerLaw:
    """The law nearest to losses, all above LEAST_LOSS, measured after `tokens`; floor and scale are never negative.

    most_exponent: ADO's authors hold α ≤ 0.8.
    """
    logs = [math.log(count) for count in tokens]
    first = logs[0]
    measured = np.array(losses, np.float64)
    width = (most_exponent - LEAST_EXPONENT) / 23
    best = _best(LEAST_EXPONENT, width, 24, logs, first, measured)
    for _ in range(2):
        begin = max(LEAST_EXPONENT, best[1] - width)
        end = min(most_exponent, best[1] + width)
        width = (end - begin) / 10
        best = min(best, _best(begin, width, 11, logs, first, measured))
    _, exponent, floor, scale = best
    return PowerLaw(floor, scale * math.exp(exponent * first), exponent)


def _best(
    begin: float, width: float, count: int, logs: list[float], first: float, losses: Floats
) -> tuple[float, float, float, float]:
    """(Huber's loss, exponent, floor, scale) of the best of `count` exponents from `begin` on, `width` apart; the scale
    is that at the first point."""
    # Relative to the first point, so that columns are of order 1. Each row is the one before times the same factors:
    # two rows of `exp` instead of all, 0.1 ms instead of 1.
    factors = np.array([math.exp(-width * (log - first)) for log in logs])
    basis = np.empty((count, len(logs)))
    basis[0] = [math.exp(-begin * (log - first)) for log in logs]
    for number in range(1, count):
        basis[number] = basis[number - 1] * factors
    weights = np.broadcast_to(1.0 / (losses * losses), basis.shape)
    for turn in range(ROUNDS):
        floor, scale = _least_squares(basis, losses, weights)
        off = np.abs((floor[:, None] + scale[:, None] * basis) / losses - 1.0)
        if turn + 1 < ROUNDS:
            weights = np.minimum(1.0, HUBER / np.maximum(off, 1e-12)) / (losses * losses)
    costs = np.where(off > HUBER, HUBER * (off - HUBER / 2), off * off / 2).sum(axis=1)
    at = int(np.argmin(costs))
    return float(costs[at]), begin + width * at, float(floor[at]), float(scale[at])


def _least_squares(basis: Floats, losses: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Floor and scale, float64[exponents] each: weighted least squares under floor ≥ 0 and scale ≥ 0."""
    total = weights.sum(axis=1)
    x, y = (weights * basis).sum(axis=1), (weights * losses).sum(axis=1)
    xx, xy = (weights * basis * basis).sum(axis=1), (weights * basis * losses).sum(axis=1)
    spread = total * xx - x * x
    flat = spread <= 1e-12 * total * xx  # all points at one place: a floor alone
    scale = np.where(flat, 0.0, (total * xy - x * y) / np.where(flat, 1.0, spread))
    floor = (y - scale * x) / total
    scale, floor = np.where(floor < 0, xy / xx, scale), np.maximum(floor, 0.0)
    return np.where(scale < 0, y / total, floor), np.maximum(scale, 0.0)
