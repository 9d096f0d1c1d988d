"""Fewer points keep every extreme."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.monitor.downsample import bucket_means, downsample, not_finite, smooth

values = st.lists(st.floats(-1e6, 1e6) | st.just(float("nan")), min_size=1, max_size=300)


@given(values, st.integers(1, 40))
def test_points_are_few_and_real_and_hold_the_extremes(numbers: list[float], buckets: int) -> None:
    x, y = np.arange(len(numbers), dtype=np.float64), np.array(numbers)
    kept_x, kept_y = downsample(x, y, buckets)
    finite = y[np.isfinite(y)]
    assert len(kept_x) <= 2 * buckets + 2
    assert (np.diff(kept_x) > 0).all()
    assert (y[kept_x.astype(int)] == kept_y).all()
    if len(finite):
        assert kept_y.min() == finite.min()
        assert kept_y.max() == finite.max()


def test_one_spike_among_a_million_stays() -> None:
    y = np.zeros(1_000_000)
    y[123_456] = 9.0
    x, kept = downsample(np.arange(1_000_000.0), y, 300)
    assert x[kept.argmax()] == 123_456
    assert len(x) < 650


@given(values, st.integers(2, 50))
def test_smoothing_keeps_straight_lines_and_what_is_not_finite(numbers: list[float], window: int) -> None:
    y = np.array(numbers)
    assert (np.isfinite(smooth(y, window)) == np.isfinite(y)).all()
    line = np.arange(len(y)) * 3.0 + 1
    assert smooth(line, window) == pytest.approx(line)


def test_smoothing_is_the_mean_of_the_neighbours() -> None:
    assert smooth(np.array([1.0, 2.0, 9.0, 4.0, 5.0]), 3).tolist() == [1.0, 4.0, 5.0, 6.0, 5.0]


def test_bucket_means_leave_gaps() -> None:
    means = bucket_means(np.array([0.0, 1.0, 9.0]), np.array([2.0, 4.0, 5.0]), np.array([0.0, 3.0, 6.0, 9.0]))
    assert means[[0, 2]].tolist() == [3.0, 5.0]
    assert np.isnan(means[1])


def test_what_is_not_finite_is_told() -> None:
    y = np.array([1.0, np.nan, np.inf])
    assert not_finite(np.arange(3.0), y) == [1.0, 2.0]
