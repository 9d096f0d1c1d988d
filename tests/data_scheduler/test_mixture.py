import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_scheduler import mixture
from data_scheduler.mixture import FEW_SLOTS, ONE, Mixer, quantize, slots
from data_scheduler.order import permutation

weight = st.one_of(st.just(0.0), st.floats(1e-6, 1.0), st.floats(1e-12, 1e-6))
weights = st.lists(weight, min_size=1, max_size=12).filter(lambda values: sum(values) > 0)


def as_shares(values: list[float]) -> np.ndarray:
    names = [str(i) for i in range(len(values))]
    return quantize(dict(zip(names, values, strict=True)), names)


@given(weights)
def test_shares_are_exact_and_near_the_weights(values: list[float]) -> None:
    shares = as_shares(values)
    assert shares.sum() == ONE
    assert (shares >= 0).all()
    for share, value in zip(shares.tolist(), values, strict=True):
        assert abs(share / ONE - value / sum(values)) < 1e-10
        assert value > 0 or share == 0


@settings(deadline=None)
@given(weights, st.integers(1, 40), st.integers(1, 120))
def test_drawn_stays_within_one_sequence_of_asked(values: list[float], batch: int, steps: int) -> None:
    shares = as_shares(values)
    mixer, drawn = Mixer(len(values)), np.zeros(len(values), dtype=np.int64)
    for step in range(1, steps + 1):
        counts = mixer.counts(shares, batch)
        assert counts.sum() == batch
        assert (counts >= 0).all()
        drawn += counts
        for source, share in enumerate(shares.tolist()):
            assert abs(int(drawn[source]) - Fraction(share, ONE) * batch * step) < 1


@settings(deadline=None)
@given(st.data(), st.integers(2, 8), st.integers(1, 30))
def test_the_bound_holds_across_changes_while_every_source_gets_a_sequence_a_step(
    data: st.DataObject, sources: int, steps: int
) -> None:
    batch = 4 * sources
    mixer, error = Mixer(sources), [Fraction(0)] * sources
    for _ in range(steps):
        values = data.draw(st.lists(st.floats(0.3, 1.0), min_size=sources, max_size=sources))
        shares = as_shares(values)
        assert (shares * batch >= ONE).all()
        counts = mixer.counts(shares, batch)
        for source, share in enumerate(shares.tolist()):
            error[source] += int(counts[source]) - Fraction(share, ONE) * batch
            assert abs(error[source]) < 1


@settings(deadline=None)
@given(st.data(), st.integers(1, 10), st.integers(1, 40), st.integers(1, 30))
def test_arbitrary_changes_lose_nothing_and_stay_near(
    data: st.DataObject, sources: int, steps: int, batch: int
) -> None:
    # No online rule can keep the error under 1 here (docs/decisions/001); promised are the sum and a small excess.
    mixer = Mixer(sources)
    for _ in range(steps):
        shares = as_shares(data.draw(st.lists(weight, min_size=sources, max_size=sources).filter(lambda v: sum(v) > 0)))
        counts = mixer.counts(shares, batch)
        assert counts.sum() == batch
        assert (counts >= 0).all()
        assert mixer.owed.sum() == 0
        assert (np.abs(mixer.owed) < 2 * ONE).all()


def test_the_counterexample_of_the_decision_record() -> None:
    # Two of four sources at share ½ each are rounded up; the weight then moves to the other two, which are owed exactly
    # one sequence each while the batch has room for one.
    mixer = Mixer(4)
    first = mixer.counts(np.array([ONE // 4] * 4), 2)
    shares = np.where(first == 0, ONE // 2, 0)
    mixer.counts(shares, 1)
    assert np.abs(mixer.owed).max() == ONE  # exactly 1: not under it, and no rule could do better


def plain_counts(owed: np.ndarray, shares: np.ndarray, batch: int) -> tuple[list[int], list[int]]:
    """(counts, owed afterwards) by the rule's own words; `Mixer.counts` must give the same."""
    targets = [before + share * batch for before, share in zip(owed.tolist(), shares.tolist(), strict=True)]
    counts = [max(target // ONE, 0) for target in targets]

    def deadline(source: int) -> tuple[bool, float, int, int]:
        share, target, over = int(shares[source]), targets[source], targets[source] - counts[source] * ONE
        room = over > 0 and target > 0
        due = float(ONE - over) / (float(share) * batch) if room and share > 0 else math.inf
        return not room, due, -target, source

    first = sorted(range(len(targets)), key=deadline)
    for turn in range(batch - sum(counts)):
        counts[first[turn % len(first)]] += 1
    while sum(counts) > batch:
        counts[max((s for s in range(len(counts)) if counts[s]), key=lambda s: counts[s] * ONE - targets[s])] -= 1
    return counts, [target - count * ONE for target, count in zip(targets, counts, strict=True)]


@settings(deadline=None)
@given(st.data(), st.integers(1, 10), st.integers(1, 20), st.integers(1, 100))
def test_counts_are_those_of_the_plain_rule(data: st.DataObject, sources: int, steps: int, batch: int) -> None:
    mixer = Mixer(sources)
    for _ in range(steps):
        shares = as_shares(data.draw(st.lists(weight, min_size=sources, max_size=sources).filter(lambda v: sum(v) > 0)))
        expected = plain_counts(mixer.owed, shares, batch)
        assert (mixer.counts(shares, batch).tolist(), mixer.owed.tolist()) == expected


def plain_slots(counts: list[int], asked: np.ndarray, lanes: np.ndarray, *key: int) -> list[int]:
    """The rule of `slots` in its own words, a slot at a time."""
    left = permutation(len(lanes), "slots", *key).tolist()
    laid_out = [-1] * len(left)
    for source in sorted(range(len(counts)), key=lambda source: (counts[source], source)):
        before = {slot: (int(asked[lanes[slot], source]), place) for place, slot in enumerate(left)}
        for slot in sorted(left, key=before.__getitem__)[: counts[source]]:
            laid_out[slot] = source
            left.remove(slot)
    for slot, source in enumerate(laid_out):
        asked[lanes[slot], source] += 1
    return laid_out


@pytest.mark.parametrize("compiled", [True, False])
@given(
    st.lists(st.one_of(st.integers(0, 3), st.integers(0, FEW_SLOTS)), min_size=1, max_size=9).filter(any),
    st.integers(1, 2 * FEW_SLOTS),
    st.integers(0, 1 << 32),
    st.sampled_from([1, 3, 40, 1 << 20]),
)
def test_slots_are_those_of_the_plain_rule(
    compiled: bool, counts: list[int], lanes: int, seed: int, apart: int
) -> None:
    """With few slots and with many, lanes that come twice, and lanes that were asked alike or far apart."""
    rng = np.random.default_rng(seed)
    asked = rng.integers(0, apart, (lanes, len(counts))).astype(np.int32)
    taken = (rng.integers(lanes) + np.arange(sum(counts))) % lanes
    expected = asked.copy()
    plain = plain_slots(counts, expected, taken, 7, 1)
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr(mixture, "LOOPS", None)
        assert slots(np.array(counts), asked, taken, 7, 1).tolist() == plain
    assert (asked == expected).all()


@given(st.lists(st.integers(0, 20), min_size=1, max_size=9).filter(any), st.integers(0, 99), st.integers(1, 40))
def test_slots_hold_the_counts_in_a_seeded_order(counts: list[int], step: int, lanes: int) -> None:
    taken = np.arange(sum(counts)) % lanes
    asked, again = (np.zeros((lanes, len(counts)), np.int32) for _ in range(2))
    laid_out = slots(np.array(counts), asked, taken, 7, step)
    assert np.bincount(laid_out, minlength=len(counts)).tolist() == counts
    assert (laid_out == slots(np.array(counts), again, taken, 7, step)).all()
    assert asked.sum(axis=0).tolist() == counts
    assert asked.sum(axis=1).tolist() == np.bincount(taken, minlength=lanes).tolist()


def test_slots_differ_from_step_to_step() -> None:
    counts, taken = np.array([5, 5, 5, 5]), np.arange(20)
    assert len({slots(counts, np.zeros((20, 4), np.int32), taken, 0, step).tobytes() for step in range(10)}) == 10


@settings(deadline=None, max_examples=20)
@given(st.lists(st.floats(0.02, 1.0), min_size=2, max_size=8), st.sampled_from([8, 24, 60]))
def test_every_lane_is_asked_for_a_source_equally_often(weights: list[float], batch: int) -> None:
    """However long the run, a lane is off by no more sequences than there are sources; chance would let it drift."""
    names = [str(number) for number in range(len(weights))]
    shares, mixer = quantize(dict(zip(names, weights, strict=True)), names), Mixer(len(names))
    asked = np.zeros((60, len(names)), np.int32)
    for step in range(60 * 100 // batch):
        slots(mixer.counts(shares, batch), asked, (step * batch + np.arange(batch)) % 60, 0, step)
    assert asked.sum() == 60 * 100
    assert (asked.max(axis=0) - asked.min(axis=0)).max() <= len(names) + 2
