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

from data_scheduler.native import LOOPS
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
        given, owed = shares.tolist(), self.owed.tolist()
        targets = [before + share * batch for before, share in zip(owed, given, strict=True)]
        counts = [target >> 40 if target > 0 else 0 for target in targets]
        missing = batch - sum(counts)
        if missing > 0:
            order = []
            for source, target in enumerate(targets):
                share, over = given[source], target - (counts[source] << 40)
                # May take one more and stay within one sequence; due when what it is owed reaches the next whole one.
                if over > 0 and target > 0:
                    deadline = float(ONE - over) / (float(share) * batch) if share > 0 else math.inf
                    order.append((False, deadline, -target, source))
                else:
                    order.append((True, math.inf, -target, source))
            order.sort()
            for turn in range(missing):
                counts[order[turn % len(order)][3]] += 1
        for _ in range(-missing):
            excess = [
                count * ONE - target if count else -(1 << 62) for count, target in zip(counts, targets, strict=True)
            ]
            counts[excess.index(max(excess))] -= 1
        self.owed = np.array([target - (count << 40) for target, count in zip(targets, counts, strict=True)], np.int64)
        return np.array(counts, np.int64)


ONCE = np.int32(1)
FEW_SLOTS = 64
"""Slots up to which plain lists are faster than numpy's calls, of which each costs as much as looking at 20 slots."""


def slots(counts: Int64, asked: Int32, lanes: Int64, *key: int | str) -> Int32:
    """The source of every slot of the batch, int32[batch]: `counts` of each, laid out so that lanes are asked alike.

    lanes: int64[batch], the lane of each slot; asked: int32[lanes, sources], how often each lane was asked for each
    source so far, brought up to date. Each source takes the lanes that were asked for it least, the rarest
    source first; ties are settled by a seeded permutation. Slots drawn at random would let lanes drift apart by the
    square root of what they gave: with 5 sequences a lane and epoch one lane would be in its second epoch before
    another ends the half of its first.
    """
    order = permutation(len(lanes), "slots", *key)
    number = counts.tolist()
    # Equal counts in the order of the sources; one that is not drawn takes nothing.
    rarest_first = [(source, number[source]) for source in sorted(range(len(number)), key=number.__getitem__)]
    wanted = [(source, count) for source, count in rarest_first if count]
    if LOOPS is not None:
        taking = np.array(wanted, np.int64).T.copy()
        laid_out = np.empty(len(lanes), np.int32)
        LOOPS.lay(taking[1], taking[0], asked, lanes, order, laid_out, asked.shape[1])
        return laid_out
    return slots_in_numpy(wanted, asked, lanes, order)


def slots_in_numpy(wanted: list[tuple[int, int]], asked: Int32, lanes: Int64, order: Int64) -> Int32:
    """`slots`, its definition: (source, lanes it takes) in turn, ties in `order`."""
    lay = _lay_few if len(lanes) <= FEW_SLOTS else _lay_many
    laid_out = np.empty(len(lanes), np.int32)
    laid_out[order] = lay(asked, lanes[order], wanted)
    tally(asked, lanes, laid_out)
    return laid_out


def tally(asked: Int32, lanes: Int64, sources: Int32) -> None:
    """Count in `asked` (int32[lanes, sources]) that each of `lanes` was asked for the source beside it."""
    if LOOPS is not None:
        LOOPS.tally(asked, lanes, sources, asked.shape[1])
    elif len(lanes) <= FEW_SLOTS and len(set(lanes.tolist())) == len(lanes):
        asked[lanes, sources] += ONCE
    else:
        np.add.at(asked, (lanes, sources), ONCE)  # a lane may come twice; six times as fast as with an int64


def _lay_few(asked: Int32, lanes: Int64, wanted: list[tuple[int, int]]) -> list[int]:
    """The source of each lane, from (source, lanes it takes) in turn: those asked for it least, of equals the first."""
    rows = asked.take(lanes, axis=0).T.tolist()
    sources, left = [0] * len(lanes), list(range(len(lanes)))
    for source, count in wanted[:-1]:
        for place in sorted(left, key=rows[source].__getitem__)[:count]:
            sources[place] = source
            left.remove(place)
    for place in left:
        sources[place] = wanted[-1][0]
    return sources


def _lay_many(asked: Int32, lanes: Int64, wanted: list[tuple[int, int]]) -> Int32:
    """As `_lay_few`, int32[lanes]. Lanes are asked alike, so there are few different numbers: taken level by level
    nothing need be sorted."""
    sources, free = np.empty(len(lanes), np.int32), np.ones(len(lanes), np.bool_)
    for source, count in wanted[:-1]:
        times = asked[:, source].take(lanes)
        level = times.min()
        while count:
            found = ((times == level) & free).nonzero()[0][:count]
            sources[found] = source
            free[found] = False
            count -= len(found)
            level = level + 1 if len(found) else times[free].min()
    sources[free] = wanted[-1][0]
    return sources
