"""Which source each sequence of a step comes from: error diffusion in exact integers.

Weights are shares of tokens; a sequence holds one source only, so they are shares of sequences too. Every step adds
w·B to what each source is owed, and the step's counts are chosen so that what was drawn stays within one sequence of
what was owed:

    |drawn_s − Σ_steps w_s·B| < 1      for every source s after every step.

Which sources are rounded up is decided by the earliest deadline (the step by which the next sequence must be drawn to
keep the bound). For constant weights this always succeeds: rounding with |error| < 1 is a unit-job schedule whose Hall
condition holds (Steiner and Yeomans, Management Science 39(6), 1993), and earliest-deadline-first finds such schedules.
When weights change after every step, no rule that cannot see the future can promise it; `docs/decisions/001-*.md` has
the four-source counterexample. There the smallest excess possible is taken and made good as soon as possible.

Shares are integers in units of 2⁻⁴⁰ that sum to exactly 1, so nothing drifts over a run of any length.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from data_scheduler.order import Int64, permutation
from headrace.errors import ConfigError

Int32 = npt.NDArray[np.int32]

ONE = 1 << 40
"""The share 1.0; w·B stays under 2⁶³ for global batches below 2²³ sequences."""


def quantize(weights: Mapping[str, float], names: Sequence[str]) -> Int64:
    """Weights (any positive scale) as int64 shares in units of 1/ONE that sum to ONE, largest remainder first.

    Raises ConfigError for unknown sources, negative or non-finite weights, or a sum of zero.
    """
    unknown = sorted(set(weights) - set(names))
    if unknown:
        raise ConfigError(f"mixture names unknown source {unknown[0]!r} (sources: {', '.join(names)})")
    values = [float(weights.get(name, 0.0)) for name in names]
    for name, value in zip(names, values, strict=True):
        if not (np.isfinite(value) and value >= 0):
            raise ConfigError(f"mixture weight of {name!r} is {value}; weights are finite and not negative")
    total = sum(values)
    if total <= 0:
        raise ConfigError("mixture weights sum to 0; give at least one source a positive weight")
    exact = [value / total * ONE for value in values]
    shares = np.array([int(value) for value in exact], dtype=np.int64)
    rest = ONE - int(shares.sum())
    # Float rounding can leave `rest` a few units negative; both signs go to the largest remainders in turn.
    by_remainder = sorted(range(len(exact)), key=lambda i: (-(exact[i] - int(exact[i])), i))
    positive = [i for i in by_remainder if values[i] > 0]
    for turn in range(abs(rest)):
        shares[positive[turn % len(positive)]] += 1 if rest > 0 else -1
    return shares


class Mixer:
    """Turns shares into counts per step. `owed` (int64[sources], units of 1/ONE) is its whole state."""

    def __init__(self, sources: int) -> None:
        self.owed: Int64 = np.zeros(sources, dtype=np.int64)

    def counts(self, shares: Int64, batch: int) -> Int64:
        """Sequences to draw per source in the next step, int64[sources], summing to `batch`.

        Plain integers: for the numbers of sources there are (2 to 50) numpy's calls cost three times as much.
        """
        given = shares.tolist()
        targets = [owed + share * batch for owed, share in zip(self.owed.tolist(), given, strict=True)]
        counts = [max(target >> 40, 0) for target in targets]
        missing = batch - sum(counts)
        if missing > 0:
            order = []
            for source, (share, target, least) in enumerate(zip(given, targets, counts, strict=True)):
                over = target - least * ONE
                # May take one more and stay within one sequence; due when what it is owed reaches the next whole one.
                room = over > 0 and target > 0
                deadline = float(ONE - over) / (float(share) * batch) if room and share > 0 else math.inf
                order.append((not room, deadline, -target, source))
            order.sort()
            for turn in range(missing):
                counts[order[turn % len(order)][3]] += 1
        for _ in range(-missing):
            excess = [
                count * ONE - target if count else -(1 << 62) for count, target in zip(counts, targets, strict=True)
            ]
            counts[excess.index(max(excess))] -= 1
        self.owed = np.array(
            [target - count * ONE for target, count in zip(targets, counts, strict=True)], dtype=np.int64
        )
        return np.array(counts, dtype=np.int64)


def slots(counts: Int64, asked: Int32, lanes: Int64, *key: int | str) -> Int32:
    """The source of every slot of the batch, int32[batch]: `counts` of each, laid out so that lanes are asked alike.

    lanes: int64[batch], the lane of each slot; asked: int32[lanes, sources], how often each lane was asked for each
    source so far, brought up to date. Each source takes the lanes that were asked for it least, the rarest source
    first; ties are settled by a seeded permutation. Slots drawn at random would let lanes drift apart by the square
    root of what they gave: with 5 sequences a lane and epoch one lane would be in its second epoch before another ends
    the half of its first.
    """
    left = permutation(len(lanes), "slots", *key)
    laid_out = np.empty(len(lanes), dtype=np.int32)
    for source in np.argsort(counts, kind="stable").tolist():
        count = int(counts[source])
        if count == len(left):
            laid_out[left] = source
            break
        if count:
            order = np.argsort(asked[lanes[left], source], kind="stable")
            laid_out[left[order[:count]]] = source
            left = left[np.sort(order[count:])]
    np.add.at(asked, (lanes, laid_out), 1)
    return laid_out
