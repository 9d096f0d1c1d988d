"""The gradient noise scale: estimated without bias, averaged over steps and restarts."""

import math

import numpy as np
import pytest

from pretrain.dynamics import NoiseScale
from pretrain.dynamics.noise_scale import Noise, estimate


@pytest.mark.parametrize("uneven", [False, True])
def test_noise_is_estimated_without_bias(uneven: bool) -> None:
    random, width, trials = np.random.default_rng(0), 30, 4000
    mean, spread = random.normal(size=width) * 0.05, random.uniform(0.5, 2.0, width)
    tokens = np.array([5, 80, 10, 40, 1]) if uneven else np.full(5, 25)
    found = []
    for _ in range(trials):
        # The sum of n tokens' gradients, each from N(mean, diag(spread²)).
        sums = [count * mean + math.sqrt(count) * spread * random.normal(size=width) for count in tokens]
        small = sum(float(each @ each) / count for each, count in zip(sums, tokens, strict=True))
        whole = np.sum(sums, axis=0) / tokens.sum()
        found.append(estimate(len(tokens), float(tokens.sum()), small, float(whole @ whole)))
    variance, signal = (np.array([getattr(each, name) for each in found]) for name in ("variance", "signal"))
    for estimates, truth in ((variance, spread @ spread), (signal, mean @ mean)):
        error = estimates.std() / math.sqrt(trials)
        assert abs(estimates.mean() - truth) < 4 * error
        assert error < 0.05 * truth  # so that a wrong factor would show
    smoothed = NoiseScale()
    scales = [smoothed.update(each) for each in found]
    late = [scale for scale in scales[trials // 2 :] if scale is not None]
    assert np.median(late) == pytest.approx((spread @ spread) / (mean @ mean), rel=0.15)


def test_equal_batches_give_the_equation_of_the_paper() -> None:
    small, large, each, micro_batches = 0.9, 0.2, 64.0, 8  # |G_small|², |G_big|², B_small, B_big / B_small
    whole = each * micro_batches
    noise = estimate(micro_batches, whole, whole * small, large)
    assert noise is not None
    assert noise.signal == pytest.approx((whole * large - each * small) / (whole - each))
    assert noise.variance == pytest.approx((small - large) / (1 / each - 1 / whole))


def test_averages_go_on_where_a_checkpoint_left_them() -> None:
    first, again = NoiseScale(), NoiseScale()
    steps = [Noise(3.0, -0.1), Noise(2.0, 0.5), Noise(float("nan"), 0.1), Noise(4.0, 0.2)]
    expected = [first.update(step) for step in steps]
    assert expected[0] is None  # no ratio of a signal below 0
    assert expected[1] == expected[2]  # a step whose gradient was not finite says nothing
    again.update(steps[0])
    resumed = NoiseScale()
    resumed.load(again.state())
    assert [resumed.update(step) for step in steps[1:]] == expected[1:]
