"""The largest values over ranks: the same as of all of them together, ties and empty ranks included."""

import functools
import math

import numpy as np
import pytest
from process_group import run_ranks

from parallel import process_groups
from parallel.layout import Layout
from pretrain.selection.top import fixed, top


def expected(values: np.ndarray, share: float) -> np.ndarray:  # type: ignore[type-arg]
    whole = fixed(values)
    return whole >= np.sort(whole)[-max(1, math.ceil(share * len(whole) - 1e-9))]


CASES = [
    np.random.default_rng(0).exponential(3.0, 1000),
    np.random.default_rng(1).normal(0.0, 2.0, 301),
    np.array([1.0, 1.0, 1.0, 1.0, 2.0]),
    np.array([5.0]),
    np.array([-3.0, np.inf, 7.0, -0.5, np.nan]),
    np.array([1e9, -1e9, 0.0]),
]


def chosen(layout: Layout, share: float, size: int) -> list[list[bool]]:
    ranks = process_groups.initialize(layout, seed=1, timeout_s=60)
    found = [top(values[ranks.dp_rank :: size], share).tolist() for values in CASES]
    if layout.world_size == 1:
        process_groups.shutdown()
    return found


@pytest.mark.parametrize("share", [0.1, 0.6, 1.0])
def test_on_one_process(share: float) -> None:
    assert chosen(Layout(1), share, 1) == [expected(values, share).tolist() for values in CASES]


@pytest.mark.multiprocess
def test_over_ranks() -> None:
    for each, share in ((functools.partial(chosen, Layout(3)), 0.6), (functools.partial(chosen, Layout(3)), 0.05)):
        found = run_ranks(3, each, share, 3)
        for number, values in enumerate(CASES):
            together = np.zeros(len(values), np.bool_)
            for rank in range(3):
                together[rank::3] = found[rank][number]
            assert together.tolist() == expected(values, share).tolist()
