"""Which lane gives which sequence: every lane in every round, every source from every lane, every rank its own."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_scheduler.mixture import Mixer, quantize, slots
from data_scheduler.order import GOLDEN, lanes_of


def plain_lanes_of(first: int, batch: int, lanes: int) -> list[int]:
    """The rule in its own words, a sequence at a time."""
    unit = math.gcd(batch, lanes)
    blocks, taken = lanes // unit, []
    for sequence in range(first, first + batch):
        group, within = divmod(sequence, unit)
        rounds, place = divmod(group, blocks)
        begun = blocks * (rounds * GOLDEN % (1 << 64) >> 32) >> 32
        taken.append((place + begun) % blocks * unit + within)
    return taken


@given(st.integers(1, 300), st.integers(1, 300), st.one_of(st.integers(0, 5000), st.integers(0, 1 << 50)))
def test_lanes_are_those_of_the_plain_rule(batch: int, lanes: int, first: int) -> None:
    assert lanes_of(first, batch, lanes).tolist() == plain_lanes_of(first, batch, lanes)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 50))
def test_a_round_takes_every_lane_once(batch: int, lanes: int, number: int) -> None:
    """Whole rounds, cut into batches as a run does."""
    steps = lanes // math.gcd(batch, lanes)
    first = number * steps * batch
    taken = np.concatenate([lanes_of(first + step * batch, batch, lanes) for step in range(steps)])
    assert (np.bincount(taken, minlength=lanes) == steps * batch // lanes).all()
    whole = lanes_of(first, batch, lanes)[: min(batch, lanes)]
    assert len(set(whole.tolist())) == len(whole)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(0, 10_000))
def test_sequence_and_lane_are_of_the_same_rank(dp: int, batches: int, lanes: int, first: int) -> None:
    batch, number = dp * batches, dp * lanes
    assert (lanes_of(first, batch, number) % dp == np.arange(first, first + batch) % dp).all()


def test_it_is_the_same_on_every_machine() -> None:
    assert lanes_of(0, 4, 12).tolist() == [0, 1, 2, 3]
    assert [int(lanes_of(12 * number, 4, 12)[0]) for number in range(8)] == [0, 4, 0, 8, 4, 0, 8, 0]
    assert lanes_of(10**12, 6, 240).tolist() == sorted(lanes_of(10**12, 6, 240).tolist())


@pytest.mark.parametrize(
    ("lanes", "batch", "weights"),
    [
        (240, 4, [0.45, 0.33, 0.10, 0.06, 0.06]),  # four sequences a step over many lanes
        (240, 24, [0.5, 0.25, 0.25]),
        (240, 8, [0.975, 0.025]),
        (60, 7, [0.9, 0.1]),
        (48, 96, [0.9, 0.07, 0.03]),
    ],
)
def test_every_source_meets_every_lane_equally_often(lanes: int, batch: int, weights: list[float]) -> None:
    names = [str(number) for number in range(len(weights))]
    shares, mixer = quantize(dict(zip(names, weights, strict=True)), names), Mixer(len(names))
    asked = np.zeros((lanes, len(names)), np.int32)
    rounds = 150
    for step in range(rounds * lanes // batch):
        slots(mixer.counts(shares, batch), asked, lanes_of(step * batch, batch, lanes), 0, step)
    for source, weight in enumerate(weights):
        mean = rounds * weight
        assert asked[:, source].min() >= 0.5 * mean
        assert asked[:, source].max() <= 1.5 * mean + 1
