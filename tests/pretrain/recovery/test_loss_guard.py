"""Which steps are anomalies, and what is decided about them."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_scheduler.journal import Event
from pretrain.config.recovery import LossGuardConfig
from pretrain.recovery.loss_guard import Anomaly, LossGuard


def guard(
    policy: str = "skip_step", events: tuple[Event, ...] = (), precision: str = "fp32", **more: object
) -> LossGuard:
    config = LossGuardConfig.model_validate({"policy": policy, "window": 64, "min_steps": 16, **more})
    return LossGuard(config, events, precision)


def curve(steps: int, seed: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of a run that goes well: falling losses with the noise of batches."""
    random = np.random.default_rng(seed)
    losses = 2.5 + 8.0 * np.arange(1, steps + 1) ** -0.4 + random.normal(0, 0.05, steps)
    norms = np.exp(random.normal(-0.5, 0.25, steps))
    return list(zip(losses.tolist(), norms.tolist(), strict=True))


def judge(judging: LossGuard, numbers: list[tuple[float, float]]) -> list[int]:
    """Steps whose update is refused."""
    refused = []
    for step, (loss, norm) in enumerate(numbers):
        judging.begin(step)
        if not judging.allows(loss, norm):
            refused.append(step)
    return refused


@given(st.integers(0, 2**32))
def test_a_run_that_goes_well_is_left_alone(seed: int) -> None:
    assert judge(guard(), curve(400, seed)) == []


@given(st.integers(0, 2**32), st.integers(40, 390), st.sampled_from(["loss", "norm", "nan", "inf norm"]))
def test_a_jump_is_found_at_its_step_and_nowhere_else(seed: int, at: int, kind: str) -> None:
    numbers = curve(400, seed)
    loss, norm = numbers[at]
    numbers[at] = {
        "loss": (loss + 3.0, norm), "norm": (loss, norm * 1000), "nan": (math.nan, norm), "inf norm": (loss, math.inf)
    }[kind]  # fmt: skip
    assert judge(guard(), numbers) == [at]


def test_a_level_that_stays_is_the_new_level() -> None:
    numbers = [(2.0 + 0.01 * (step % 5), 1.0) for step in range(100)] + [
        (4.0 + 0.01 * (step % 5), 1.0) for step in range(100)
    ]
    refused = judge(guard(), numbers)
    assert refused[0] == 100
    assert refused[-1] < 100 + 16


def test_policies() -> None:
    numbers = [*curve(100, 0), (50.0, 1.0)]
    assert judge(guard("skip_step"), numbers) == [100]
    warned = guard("warn")
    assert judge(warned, numbers) == []
    assert warned.anomaly is not None
    assert "above that of the 16 steps before" in warned.anomaly.why


def test_fp16_may_look_for_its_loss_scale() -> None:
    numbers = [*curve(100, 0), (3.0, math.inf)]
    assert judge(guard(precision="fp16"), numbers) == []
    assert judge(guard(precision="bf16"), numbers) == [100]


@given(st.integers(20, 90))
def test_a_resumed_guard_judges_as_the_one_before(cut: int) -> None:
    numbers = [*curve(100, 1), (9.0, 1.0), *curve(20, 2)]
    whole = guard()
    judge(whole, numbers)
    first = guard()
    judge(first, numbers[:cut])
    second = guard()
    second.load(json.loads(json.dumps(first.state())))
    judge(second, numbers[cut:])
    assert second.state() == whole.state()


def rollback_event(judging: LossGuard, step: int, to: int) -> Event | None:
    anomaly = Anomaly(step, "why", math.nan, 1.0)
    decision = judging.decide(anomaly, [to])
    return (
        None
        if decision is None
        else Event(0, 0.0, to, "rollback", json.loads(json.dumps(decision.data(anomaly))), "system")
    )


def test_first_the_same_again_then_windows_that_grow_then_no_way_on() -> None:
    events: list[Event] = []
    windows = []
    while (event := rollback_event(guard("rollback", tuple(events), quarantine=2), 50, 40)) is not None:
        events.append(event)
        windows.append(event.data["passed_over"])
    assert windows == [None, [49, 50], [47, 50], [45, 50]]
    assert [event.data["cause"] for event in events] == ["unknown"] + 3 * ["data or optimisation"]
    last = guard("rollback", tuple(events), lr_factor=0.5, lr_steps=10)
    refused = judge(last, [(2.0, 1.0)] * 60)
    assert refused == [45, 46, 47, 48, 49, 50]
    assert [step for step in range(70) if last.lr_scale(step) == 0.5] == list(range(51, 61))


def test_trouble_that_moves_on_with_the_run_ends_too() -> None:
    events: list[Event] = []
    for step in range(50, 100):
        event = rollback_event(guard("rollback", tuple(events)), step, 40)
        if event is None:
            break
        events.append(event)
    assert len(events) == 8


def test_an_anomaly_that_does_not_come_back_is_not_of_the_data() -> None:
    judging = guard("rollback")
    event = rollback_event(judging, 50, 40)
    assert event is not None
    again = guard("rollback", (event,))
    again.begin(50)
    assert again.allows(2.0, 1.0)
    finding = again.not_reproduced(50)
    assert finding is not None
    assert "hardware" in finding.cause
    again.note(finding)
    assert again.not_reproduced(50) is None


def test_a_window_that_could_never_fill_is_refused() -> None:
    with pytest.raises(ValueError, match="min_steps is more than window"):
        LossGuardConfig(window=16, min_steps=32)


def test_when_nothing_helps_from_the_newest_the_older_ones_come_once_each() -> None:
    events: list[Event] = []
    found = []
    for step in range(20, 60):  # the trouble moves on with the run
        while True:
            judging = guard("rollback", tuple(events), quarantine=2, max_attempts=1)
            anomaly = Anomaly(step, "why", math.nan, 1.0)
            decision = judging.decide(anomaly, [18, 12, 6])
            if decision is None:
                break
            data = json.loads(json.dumps(decision.data(anomaly)))
            events.append(Event(0, 0.0, decision.to, "rollback", data, "system"))
            found.append((decision.to, decision.passed_over))
            if decision.passed_over is not None:  # which makes this step go well
                break
        if decision is None:
            break
    assert [to for to, _ in found] == [18, 18, 18, 18, 12, 6]
    assert found[4:] == [(12, (16, 22)), (6, (10, 23))]
