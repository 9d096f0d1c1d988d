"""The learning-rate schedule: pure, bounded, with its corners where the configuration says, in steps and in tokens."""

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_scheduler import Journal
from data_scheduler.plan import Plan
from data_scheduler.stages import tokens_before, turns
from data_scheduler.timeline import Timeline
from headrace.errors import ConfigError
from pretrain.config import OptimizerConfig, RunConfig, validate_config
from pretrain.learning_rate import learning_rate, rate

KINDS = ["cosine", "wsd", "linear", "constant", "inverse_sqrt"]
SHAPES = ["linear", "1-sqrt", "cosine"]


@st.composite
def schedules(draw: st.DrawFn) -> tuple[OptimizerConfig, int]:
    total = draw(st.integers(1, 400))
    peak = draw(st.floats(1e-6, 1.0))
    kind = draw(st.sampled_from(KINDS))
    config = OptimizerConfig(
        lr=peak,
        min_lr=peak * draw(st.floats(0.0, 1.0)),
        schedule=kind,  # type: ignore[arg-type]
        decay_shape=draw(st.sampled_from(SHAPES if kind in ("wsd", "inverse_sqrt") else SHAPES[:1])),  # type: ignore[arg-type]
        warmup_steps=draw(st.integers(1 if kind == "inverse_sqrt" else 0, 500)),
        decay_steps=draw(st.none() | st.integers(0, 500)),
    )
    return config, total


@given(schedules())
def test_stays_between_zero_and_the_peak_and_above_min_lr_after_warmup(case: tuple[OptimizerConfig, int]) -> None:
    config, total = case
    for step in range(total):
        found = rate(step + 1, config, total)
        assert 0.0 < found <= config.lr * (1 + 1e-12) or found == config.min_lr == 0.0
        if step + 1 >= config.warmup_steps:
            assert found >= config.min_lr * (1 - 1e-12)


@given(schedules())
def test_rises_while_warming_up_then_never_rises_again(case: tuple[OptimizerConfig, int]) -> None:
    config, total = case
    rates = [rate(step + 1, config, total) for step in range(total)]
    for step, (before, after) in enumerate(itertools.pairwise(rates), start=1):
        if step + 1 < config.warmup_steps:
            assert after > before
        elif step + 1 > config.warmup_steps:
            assert after <= before * (1 + 1e-12)


@given(schedules())
def test_warmup_is_a_straight_line_to_the_peak(case: tuple[OptimizerConfig, int]) -> None:
    config, total = case
    for step in range(min(total, config.warmup_steps - 1)):
        assert rate(step + 1, config, total) == pytest.approx(config.lr * (step + 1) / config.warmup_steps)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_the_last_update_is_at_min_lr(schedule: str) -> None:
    config = OptimizerConfig(lr=1.0, min_lr=0.1, schedule=schedule, warmup_steps=10)  # type: ignore[arg-type]
    assert rate(100, config, 100) == 0.1
    assert rate(99, config, 100) > 0.1
    assert rate(10, config, 100) == 1.0


def test_known_values() -> None:
    cosine = OptimizerConfig(lr=1.0, min_lr=0.0, schedule="cosine", warmup_steps=0, decay_steps=50)
    assert rate(25, cosine, 100) == pytest.approx(0.5)
    assert rate(81, cosine, 100) == 0.0
    linear = OptimizerConfig(lr=1.0, min_lr=0.2, schedule="linear")
    assert rate(50, linear, 100) == pytest.approx(0.6)
    wsd = OptimizerConfig(lr=1.0, min_lr=0.0, schedule="wsd", decay_steps=20)
    assert [rate(done, wsd, 100) for done in (1, 51, 80)] == [1.0, 1.0, 1.0]
    assert rate(90, wsd, 100) == pytest.approx(0.5)
    constant = OptimizerConfig(lr=1.0, schedule="constant", warmup_steps=4)
    assert [rate(done, constant, 100) for done in (1, 2, 3, 4, 100)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_known_values_of_inverse_sqrt() -> None:
    config = OptimizerConfig(lr=1.0, min_lr=0.0, schedule="inverse_sqrt", warmup_steps=16)
    assert [rate(done, config, 1600) for done in (8, 16, 64, 400, 1600)] == [0.5, 1.0, 0.5, 0.2, 0.1]
    # arXiv 1706.03762, equation 3, with the peak that its warm-up reaches.
    width, warmup = 512, 4000
    peak = width**-0.5 * warmup**-0.5
    paper = OptimizerConfig(lr=peak, min_lr=0.0, schedule="inverse_sqrt", warmup_steps=warmup)
    for number in (1, 77, 3999, 4000, 4001, 90_000):
        expected = width**-0.5 * min(number**-0.5, number * warmup**-1.5)
        assert rate(number, paper, 100_000) == pytest.approx(expected, rel=1e-12)
    cooled = OptimizerConfig(lr=1.0, min_lr=0.1, schedule="inverse_sqrt", warmup_steps=1, decay_steps=36)
    assert [rate(done, cooled, 100) for done in (4, 64, 82, 100)] == pytest.approx([0.5, 0.125, 0.1125, 0.1])
    assert rate(64, OptimizerConfig(lr=1.0, min_lr=0.3, schedule="inverse_sqrt", warmup_steps=1), 100) == 0.3


def test_known_values_of_decay_shapes() -> None:
    for shape, expected in (
        ("linear", [1.0, 0.75, 0.5, 0.0]),
        ("1-sqrt", [1.0, 0.5, 1 - math.sqrt(0.5), 0.0]),
        ("cosine", [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, 0.0]),
    ):
        config = OptimizerConfig(lr=1.0, min_lr=0.0, schedule="wsd", decay_shape=shape, decay_steps=40)  # type: ignore[arg-type]
        assert [rate(done, config, 100) for done in (60, 70, 80, 100)] == pytest.approx(expected), shape


# -- of a whole run: tokens, and segments ------------------------------------------------------------------------------


def run(
    steps: int, optimizer: dict[str, Any], stages: list[dict[str, Any]] | None = None
) -> tuple[RunConfig, Timeline]:
    """A run of 4 sequences of 8 tokens a step, and the batch shapes that its journal would have."""
    raw = {
        "run": {"dir": "unused"},
        "model": {"family": "llama", "num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "ffn_hidden_size": 8},
        "data": {"tokenizer": "t", "sources": [{"name": "a", "paths": ["a"]}], "seq_len": 8, "global_batch_size": 4},
        "train": {"steps": steps},
        "optimizer": optimizer,
        "stages": stages or [],
    }
    config = validate_config(raw, "test")
    journal = Journal()
    for turn in turns(config.data, steps, Timeline()):
        journal.append("stage", turn.step, turn.data, "config")
    return config, Plan(journal).shape


def rates(steps: int, optimizer: dict[str, Any], stages: list[dict[str, Any]] | None = None) -> list[float]:
    config, shape = run(steps, optimizer, stages)
    return [learning_rate(config, shape, step) for step in range(steps)]


@given(
    kind=st.sampled_from(KINDS),
    warmup=st.integers(1, 20),
    decay=st.none() | st.integers(0, 30),
    begin=st.sampled_from([10, 20]),
)
def test_tokens_are_steps_while_the_batch_stays(kind: str, warmup: int, decay: int | None, begin: int) -> None:
    both: dict[str, Any] = {"lr": 1.0, "min_lr": 0.1, "schedule": kind}
    in_steps = {"warmup_steps": warmup, "decay_steps": decay}
    in_tokens = {"warmup_tokens": 32 * warmup, "decay_tokens": None if decay is None else 32 * decay}
    segment = [{"from_step": begin, "learning_rate": {"lr": 0.5, "schedule": "linear"}}]
    # By tens: a tenth of the steps' tokens is else not the tokens of a tenth of the steps.
    assert rates(40, both | in_tokens, segment) == pytest.approx(rates(40, both | in_steps, segment))
    assert rates(40, both | in_tokens) == pytest.approx(rates(40, both | in_steps))


@st.composite
def ramps(draw: st.DrawFn) -> list[dict[str, Any]]:
    unit = draw(st.sampled_from(["from_step", "from_tokens"]))
    scale = 1 if unit == "from_step" else 40
    first, every = draw(st.integers(0, 8)), draw(st.integers(1, 6))
    stages = [{unit: first * scale, "batch_ramp": {"to": 32, "multiply": 2, "every": every * scale}}]
    if draw(st.booleans()):
        stages.append({unit: (first + 2 * every + 1 + draw(st.integers(0, 5))) * scale, "seq_len": 16})
    return stages


@given(stages=ramps(), warmup=st.integers(0, 3000), peak=st.floats(1e-6, 1.0))
def test_a_warmup_in_tokens_follows_the_tokens_under_a_batch_ramp(
    stages: list[dict[str, Any]], warmup: int, peak: float
) -> None:
    steps = 30
    config, shape = run(steps, {"lr": peak, "schedule": "constant", "warmup_tokens": warmup}, stages)
    given_tokens = [tokens_before(shape, step + 1) for step in range(steps)]
    found = [learning_rate(config, shape, step) for step in range(steps)]
    assert found == pytest.approx([peak * min(1.0, tokens / max(1, warmup)) for tokens in given_tokens])
    # Per token the way up is the same, however many of them a step has: that is what tokens are for.
    for (a, b), (x, y) in zip(itertools.pairwise(given_tokens), itertools.pairwise(found), strict=True):
        if b < warmup:
            assert (y - x) / (b - a) == pytest.approx(peak / warmup)


@given(stages=ramps(), kind=st.sampled_from(["cosine", "linear", "wsd"]))
def test_a_decay_in_tokens_ends_with_the_last_token(stages: list[dict[str, Any]], kind: str) -> None:
    config, shape = run(30, {"lr": 1.0, "min_lr": 0.1, "schedule": kind, "warmup_tokens": 100}, stages)
    total = tokens_before(shape, 30)
    assert learning_rate(config, shape, 29) == 0.1
    if kind == "linear":
        done = (tokens_before(shape, 21) - 100) / (total - 100)
        assert learning_rate(config, shape, 20) == pytest.approx(min(1.0, 1.0 - 0.9 * done))


def test_a_segment_counts_from_its_stage() -> None:
    found = rates(
        8,
        {"lr": 1.0, "min_lr": 0.1, "schedule": "linear"},
        [{"from_step": 4, "learning_rate": {"lr": 0.6, "min_lr": 0.0, "warmup_steps": 2}}],
    )
    assert found == pytest.approx([0.775, 0.55, 0.325, 0.1, 0.35, 0.6, 0.3, 0.0])
    # Pre-training at constant rate, mid-training re-warmed and annealed to 0, in tokens; a stage between says nothing.
    found = rates(
        16,
        {"lr": 1.0, "schedule": "constant", "warmup_steps": 2},
        [
            {"from_step": 4, "global_batch_size": 8},
            {"from_step": 6, "learning_rate": {"lr": 0.5, "schedule": "wsd", "min_lr": 0.0, "decay_tokens": 256}},
            {"from_step": 8, "global_batch_size": 4},
            {"from_step": 12, "learning_rate": {"lr": 1.0, "schedule": "constant", "warmup_tokens": 96}},
        ],
    )
    shaped = {
        "lr": 1.0,
        "schedule": "wsd",
        "decay_shape": "1-sqrt",
        "decay_steps": 0,
    }  # which linear does not take over
    found_linear = rates(8, shaped, [{"from_step": 4, "learning_rate": {"schedule": "linear", "min_lr": 0.0}}])
    assert found_linear == pytest.approx([1.0] * 4 + [0.75, 0.5, 0.25, 0.0])
    first = [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]
    # 2 · 64 + 4 · 32 tokens in all: decay over all 256 of them.
    decays = [0.5 * (1 - given / 256) for given in (64, 128, 160, 192, 224, 256)]
    assert found == pytest.approx([*first, *decays, 1 / 3, 2 / 3, 1.0, 1.0])


@given(
    begins=st.lists(st.integers(1, 29), min_size=1, max_size=3, unique=True).map(sorted),
    peaks=st.lists(st.floats(0.01, 1.0), min_size=3, max_size=3),
    warmup=st.integers(1, 6),
)
def test_a_segment_with_a_warmup_makes_no_jump(begins: list[int], peaks: list[float], warmup: int) -> None:
    stages = [
        {"from_step": begin, "learning_rate": {"lr": peak, "min_lr": 0.01, "warmup_steps": warmup}}
        for begin, peak in zip(begins, peaks, strict=False)
    ]
    found = rates(30, {"lr": 1.0, "min_lr": 0.01, "schedule": "linear"}, stages)
    for begin, peak in zip(begins, peaks, strict=False):
        assert found[begin] - found[begin - 1] == pytest.approx((peak - found[begin - 1]) / warmup)


def test_a_resumed_run_with_other_stages_counts_on_from_where_the_schedule_began() -> None:
    config, _ = run(20, {"lr": 1.0, "schedule": "linear", "min_lr": 0.0}, [
        {"from_step": 5, "learning_rate": {"lr": 0.5}}, {"from_step": 12, "seq_len": 16},
    ])  # fmt: skip
    journal = Journal()
    for step, data in ((0, {}), (5, {"stage": 0}), (8, {"stage": 1}), (9, {"stage": 0}), (12, {"stage": 1})):
        journal.append("stage", step, {"seq_len": 8, "global_batch_size": 4} | data, "config")
    shape = Plan(journal).shape
    assert [learning_rate(config, shape, step) for step in (4, 5, 9, 19)] == pytest.approx(
        [0.0, 0.5 * 14 / 15, 1 / 3, 0]
    )


@pytest.mark.parametrize(
    ("optimizer", "stage", "message"),
    [
        ({"warmup_steps": 3, "decay_tokens": 9}, {}, "optimizer: lengths are in steps or in tokens; give *_steps or"),
        (
            {"schedule": "inverse_sqrt"},
            {},
            "optimizer: schedule inverse_sqrt falls as √(warm-up / n); give warmup_steps",
        ),
        (
            {"decay_shape": "1-sqrt"},
            {},
            "optimizer.decay_shape: schedule cosine has its own shape; leave decay_shape out",
        ),
        ({"lr": 1e-6}, {}, "optimizer: min_lr 3e-05 is above lr 1e-06; give a lower min_lr"),
        ({}, {"lr": 1e-6}, "stages.0.learning_rate: min_lr 3e-05 is above lr 1e-06"),
        ({}, {"warmup_steps": 1, "decay_tokens": 5}, "stages.0.learning_rate: lengths are in steps or in tokens"),
        ({"schedule": "inverse_sqrt", "warmup_steps": 2}, {"lr": 1.0}, "stages.0.learning_rate: schedule inverse_sqrt"),
        ({}, {"schedule": "wsdd"}, "stages.0.learning_rate.schedule: input should be"),
    ],
)
def test_schedules_that_mean_nothing(optimizer: dict[str, Any], stage: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run(9, optimizer, [{"from_step": 3, "learning_rate": stage}])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
