"""Policies of stages: each begins where its stage does, in a run as in a simulation."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from staged_runs import CURRICULUM, STEPS, Make, counts, staged

from data_scheduler import Scheduler
from data_scheduler.assumed_losses import FLAT_LOSS
from data_scheduler.replay import replay
from data_scheduler.simulate import estimate_sources, simulate
from headrace.errors import ConfigError


@pytest.mark.parametrize(
    "policy",
    [
        {"kind": "odm", "options": {"warmup_steps": 3}, "horizon": 3, "guard": {"min_share": 0.1}},
        {"kind": "unimax", "options": {"max_epochs": 2.0}},
        {"kind": "schedule", "options": {"stages": [{"from_tokens": 3000, "weights": {"b": 1.0}}]}},
    ],
    ids=lambda policy: policy["kind"],
)
def test_policies_go_through_stages_alike_in_a_run_and_in_a_simulation(
    data_config: Make, policy: dict[str, Any]
) -> None:
    stages = [dict(stage) for stage in CURRICULUM]
    if policy["kind"] == "schedule":
        for stage in stages:
            stage.pop("weights", None)
    config = staged(data_config, stages=stages, policy=policy)
    scheduler = Scheduler(config, run_steps=STEPS)
    drawn = []
    for step in range(STEPS):
        drawn += counts(scheduler, 1)
        given = [name for name, count in zip("abcd", drawn[-1], strict=True) if count]
        scheduler.feedback(step, dict.fromkeys(given, FLAT_LOSS), dict.fromkeys(given, 64))
    volumes = estimate_sources(config)
    assert [s.sequences for s in simulate(config, volumes, STEPS).sources] == np.sum(drawn, axis=0).tolist()
    if policy["kind"] == "schedule":  # 4 · 6 · 32 tokens, then 6 · 128 a step: 3,072 with the seventh
        assert [event.step for event in scheduler.journal.of("mixture")] == [0, 7]
    else:  # sources that a stage does not name are off, also for the bounds
        assert drawn[11][1:3] == [0, 0]
        assert drawn[13] == [0, 0, 24, 0]
    scheduler.close()


ODM: dict[str, Any] = {"kind": "odm", "options": {"warmup_steps": 2}}
PATIENT: dict[str, Any] = {"kind": "odm", "options": {"warmup_steps": 3}}
POLICIES: list[dict[str, Any]] = [
    {"from_step": 3, "policy": ODM},
    {"from_step": 6, "global_batch_size": 12},
    {
        "from_step": 8,
        "policy": {"kind": "temperature", "options": {"temperature": 2.0}},
        "weights": {"a": 4.0, "d": 1.0},
    },
    {"from_step": 10, "policy": ODM},
    {"from_step": 12, "policy": PATIENT},
]


def told(scheduler: Scheduler, steps: int) -> list[list[int]]:
    """What was drawn in `steps` steps, each told to the scheduler as `DryRun` tells it."""
    drawn = []
    for step in range(scheduler.next_step, scheduler.next_step + steps):
        drawn += counts(scheduler, 1)
        given = {name: count for name, count in zip("abcd", drawn[-1], strict=True) if count}
        losses = {name: 1.0 + step / (1 + "abcd".index(name)) for name in given}
        scheduler.feedback(step, losses, {name: count * 32 for name, count in given.items()})
    return drawn


def test_a_stage_has_its_own_policy_which_begins_anew_and_is_resumed_exactly(data_config: Make, tmp_path: Path) -> None:
    guard = {"guard": {"min_share": 0.05, "max_change": 0.4}, "horizon": 3}
    config = staged(data_config, stages=POLICIES, policy=guard)

    def go(folder: Path, *stops: int) -> tuple[list[list[int]], Scheduler]:
        drawn: list[list[int]] = []
        state = None
        for stop in (*stops, STEPS):
            scheduler = Scheduler(config, run_dir=folder, run_steps=STEPS)
            if state is not None:
                scheduler.load_state_dict(state)
            drawn += told(scheduler, stop - len(drawn))
            state = scheduler.state_dict()
            scheduler.close()
        return drawn, scheduler

    whole, scheduler = go(tmp_path / "whole")
    weights = {"a": 4.0, "b": 0.0, "c": 0.0, "d": 1.0}
    own = {source.name: source.weight for source in config.sources}
    assert [(event.step, event.data) for event in scheduler.journal.of("policy")] == [
        (3, ODM | {"weights": own, "stage": 0}),
        (8, {"kind": "temperature", "options": {"temperature": 2.0}, "weights": weights, "stage": 2}),
        (10, ODM | {"weights": weights, "stage": 3}),
        (12, PATIENT | {"weights": weights, "stage": 4}),
    ]
    mixture = {event.step: (event.by, event.data["weights"]) for event in scheduler.journal.of("mixture")}
    assert [mixture[step][0] for step in (0, 3, 8, 10)] == [
        f"policy:{kind}" for kind in ("static", "odm", "temperature", "odm")
    ]
    # The second odm begins from the weights, not from what the first had learned. Guard-rails hold throughout.
    assert [name for name, share in mixture[8][1].items() if share] == ["a", "d"]
    for step in (10, 12):
        begun = scheduler.plan.mixture.at(step)
        assert begun == pytest.approx({"a": 0.8, "b": 0.0, "c": 0.0, "d": 0.2}, abs=1e-6), step
    assert len([step for step in mixture if 3 < step < 8]) > 1
    assert all(weights[name] >= 0.05 - 1e-6 for step, (_, weights) in mixture.items() for name in "ad")
    again = [np.bincount(batch.source_ids, minlength=4).tolist() for batch in replay(tmp_path / "whole", 0, STEPS - 1)]
    assert again == whole
    for stops in ((3,), (5, 8), (9, 10, 12)):
        assert go(tmp_path / f"stopped-{stops[0]}", *stops)[0] == whole, stops


def test_a_simulation_knows_the_policies_of_stages(data_config: Make) -> None:
    config = staged(data_config, stages=POLICIES, policy={"horizon": 3})
    scheduler = Scheduler(config, run_steps=STEPS)
    drawn = []
    for step in range(STEPS):
        drawn += counts(scheduler, 1)
        given = [name for name, count in zip("abcd", drawn[-1], strict=True) if count]
        scheduler.feedback(step, dict.fromkeys(given, FLAT_LOSS), dict.fromkeys(given, 64))
    scheduler.close()
    simulation = simulate(config, estimate_sources(config), STEPS)
    assert [source.sequences for source in simulation.sources] == np.sum(drawn, axis=0).tolist()
    assert simulation.policy == "static, then odm, then temperature, then odm"


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"kind": "odmm"}, "stages.1.policy.kind: no policy 'odmm' (known: "),
        ({"kind": "temperature", "options": {"temp": 1.0}}, "stages.1.policy.options of 'temperature': "),
        ({"kind": "odm"}, "data.policy.horizon: 2 must be larger than 2 (data.prefetch)"),
    ],
)
def test_a_policy_that_a_later_stage_cannot_have_is_refused_at_the_start(
    data_config: Make, tmp_path: Path, policy: dict[str, Any], message: str
) -> None:
    stages = [{"from_step": 2, "seq_len": 16}, {"from_step": 10_000, "policy": policy}]
    with pytest.raises(ConfigError) as caught:
        Scheduler(staged(data_config, stages=stages, policy={"horizon": 2}), run_dir=tmp_path)
    assert message in str(caught.value)
    assert (tmp_path / "journal.jsonl").read_bytes() == b""
