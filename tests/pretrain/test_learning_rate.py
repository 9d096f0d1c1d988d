"""The learning-rate schedule: pure, bounded, and with its corners where the configuration says."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.config import OptimizerConfig
from pretrain.learning_rate import learning_rate


@st.composite
def schedules(draw: st.DrawFn) -> tuple[OptimizerConfig, int]:
    total = draw(st.integers(1, 400))
    peak = draw(st.floats(1e-6, 1.0))
    config = OptimizerConfig(
        lr=peak,
        min_lr=peak * draw(st.floats(0.0, 1.0)),
        schedule=draw(st.sampled_from(["cosine", "wsd", "linear", "constant"])),
        warmup_steps=draw(st.integers(0, 500)),
        decay_steps=draw(st.none() | st.integers(0, 500)),
    )
    return config, total


@given(schedules())
def test_stays_between_zero_and_the_peak_and_above_min_lr_after_warmup(case: tuple[OptimizerConfig, int]) -> None:
    config, total = case
    for step in range(total):
        rate = learning_rate(step, config, total)
        assert 0.0 < rate <= config.lr * (1 + 1e-12) or rate == config.min_lr == 0.0
        if step + 1 >= config.warmup_steps:
            assert rate >= config.min_lr * (1 - 1e-12)


@given(schedules())
def test_rises_while_warming_up_then_never_rises_again(case: tuple[OptimizerConfig, int]) -> None:
    config, total = case
    rates = [learning_rate(step, config, total) for step in range(total)]
    for step, (before, after) in enumerate(itertools.pairwise(rates), start=1):
        if step + 1 < config.warmup_steps:
            assert after > before
        elif step + 1 > config.warmup_steps:
            assert after <= before * (1 + 1e-12)


@given(schedules())
def test_warmup_is_a_straight_line_to_the_peak(case: tuple[OptimizerConfig, int]) -> None:
    config, total = case
    for step in range(min(total, config.warmup_steps - 1)):
        assert learning_rate(step, config, total) == pytest.approx(config.lr * (step + 1) / config.warmup_steps)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_the_last_update_is_at_min_lr(schedule: str) -> None:
    config = OptimizerConfig(lr=1.0, min_lr=0.1, schedule=schedule, warmup_steps=10)  # type: ignore[arg-type]
    assert learning_rate(99, config, 100) == 0.1
    assert learning_rate(98, config, 100) > 0.1
    assert learning_rate(9, config, 100) == 1.0


def test_known_values() -> None:
    cosine = OptimizerConfig(lr=1.0, min_lr=0.0, schedule="cosine", warmup_steps=0, decay_steps=50)
    assert learning_rate(24, cosine, 100) == pytest.approx(0.5)
    assert learning_rate(80, cosine, 100) == 0.0
    linear = OptimizerConfig(lr=1.0, min_lr=0.2, schedule="linear")
    assert learning_rate(49, linear, 100) == pytest.approx(0.6)
    wsd = OptimizerConfig(lr=1.0, min_lr=0.0, schedule="wsd", decay_steps=20)
    assert [learning_rate(step, wsd, 100) for step in (0, 50, 79)] == [1.0, 1.0, 1.0]
    assert learning_rate(89, wsd, 100) == pytest.approx(0.5)
    constant = OptimizerConfig(lr=1.0, schedule="constant", warmup_steps=4)
    assert [learning_rate(step, constant, 100) for step in (0, 1, 2, 3, 99)] == [0.25, 0.5, 0.75, 1.0, 1.0]
