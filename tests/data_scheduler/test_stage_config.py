"""Stages as they are written: mistakes are named, lanes fit, a scheduler alone takes the data's part of a run's."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from staged_runs import LANES, Make, staged

from data_scheduler import DataConfig, DataScheduler, Scheduler
from data_scheduler.stages import changes, turns
from data_scheduler.timeline import Timeline
from headrace.errors import ConfigError
from pretrain.config import load_config


def test_the_worked_example(data_config: Make) -> None:
    config = data_config(
        seq_len=64,
        global_batch_size=4,
        stages=[
            {"from_tokens": 1000, "seq_len": 128},
            {"from_tokens": 3000, "batch_ramp": {"to": 16, "multiply": 2, "every": 2000}},
        ],
    )
    found = [tuple(turn) for turn in turns(config, None, Timeline())]
    assert found == [(0, None, 64, 4), (4, 0, 128, 4), (8, 1, 128, 8), (10, 1, 128, 16)]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"seq_len": 64}], "begins at one of from_step, from_tokens, from_share; this one has none"),
        ([{"from_step": 1, "from_share": 0.1}], "this one has from_step and from_share"),
        ([{"from_step": 5}, {"from_step": 5}], "stages.1.from_step: 5 does not come after 5"),
        ([{"from_step": 5}, {"from_tokens": 500}], "stages.1.from_tokens: all stages begin in the same unit"),
        ([{"from_share": 1.5}], "less than or equal to 1"),
        ([{"from_step": 1, "weights": {"x": 1.0}}], "stages.0.weights: no source 'x' (sources: a, b, c, d)"),
        ([{"from_step": 1, "weights": {"a": 0.0}}], "stages.0.weights: give at least one source a positive weight"),
        ([{"from_step": 1, "weights": {"a": -1.0}}], "greater than or equal to 0"),
        ([{"from_step": 1, "batch_ramp": {"to": 48, "every": 2}}], "batch_ramp: give add or multiply"),
        ([{"from_step": 1, "batch_ramp": {"to": 48, "add": 2, "multiply": 2, "every": 2}}], "give add or multiply"),
        (
            [{"from_step": 1, "batch_ramp": {"to": 40, "multiply": 2, "every": 2}}],
            "from 24 a batch does not grow to 40",
        ),
        ([{"from_step": 1, "batch_ramp": {"to": 24, "add": 2, "every": 2}}], "from 24 a batch does not grow to 24"),
        ([{"from_step": 1, "batch_ramp": {"to": 10**9, "add": 1, "every": 2}}], "is more than 1000 times"),
        (
            [{"from_step": 1, "batch_ramp": {"to": 48, "add": 2, "every": 0.5}}],
            "batch_ramp.every: whole steps, got 0.5",
        ),
        ([{"from_step": 1, "batch_ramp": {"to": 48, "add": 2, "every": 0}}], "greater than 0"),
        ([{"from_step": 1, "global_batch_size": 8, "batch_ramp": {"to": 48, "add": 2, "every": 1}}], "or batch_ramp"),
        (
            [{"from_step": 1, "batch_ramp": {"to": 96, "multiply": 2, "every": 9}}, {"from_step": 5}],
            "stages.0.batch_ramp: ends at 10, after the next stage has begun at 5",
        ),
    ],
)
def test_mistakes_are_named(data_config: Make, stages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        data_config(stages=stages)
    assert message in str(caught.value)


def test_weights_need_a_policy_and_bounds_that_use_them(data_config: Make) -> None:
    schedule = {"kind": "schedule", "options": {"stages": []}}
    with pytest.raises(ValidationError, match="'schedule' has mixtures of its own"):
        staged(data_config, policy=schedule)
    with pytest.raises(ValidationError, match=r"stages.0.weights: the sources' least shares sum to 1.2"):
        wide = {"from_step": 3, "weights": dict.fromkeys("abcd", 1.0)}
        two = [{"name": n, "paths": ["x"], "weight": float(n in "ab")} for n in "abcd"]
        data_config(sources=two, stages=[wide], policy={"guard": {"min_share": 0.3}})
    with pytest.raises(ConfigError, match=r"from_share needs the run's length, train.steps"):
        Scheduler(data_config(stages=[{"from_share": 0.5, "seq_len": 16}]))


def test_lanes_fit_the_largest_batch() -> None:
    def lanes(batch: int, *sizes: int) -> int:
        stages = [{"from_step": n + 1, "global_batch_size": size} for n, size in enumerate(sizes)]
        sources = [{"name": "a", "paths": ["a"]}]
        raw = {"tokenizer": "t", "sources": sources, "global_batch_size": batch, "stages": stages}
        return DataConfig.model_validate(raw).lanes

    assert [lanes(8), lanes(8, 64), lanes(7, 240), lanes(64, 8), lanes(32, 1024)] == [240, 192, 240, 192, 128]


def test_the_scheduler_alone_takes_the_data_part_of_a_runs_stages(data_config: Make, tmp_path: Path) -> None:
    data = data_config(seq_len=32, global_batch_size=6, lanes=LANES).model_dump(exclude={"stages"})
    model = {"family": "llama", "num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "ffn_hidden_size": 8}
    stages = [{"from_step": 2, "seq_len": 16, "rope_base": 5e5, "lr_scale": 0.5}]
    run = {"run": {"dir": "x"}, "model": model, "data": data, "train": {"steps": 4}, "stages": stages}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    loaded = load_config(tmp_path / "run.yaml")
    alone = DataScheduler.from_config(tmp_path / "run.yaml")
    assert loaded.data.stages == alone.scheduler.config.stages
    batches = iter(alone)
    assert [next(batches)["tokens"].shape for _ in range(4)] == [(6, 33), (6, 33), (6, 17), (6, 17)]
    alone.scheduler.close()
    other = run | {"data": data | {"stages": [{"from_step": 3, "seq_len": 16}]}}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(other))
    for load in (load_config, DataScheduler.from_config):
        with pytest.raises(ConfigError, match=r"two.yaml.*data.stages is another list than stages; leave it out"):
            load(tmp_path / "two.yaml")


def test_changes_of_a_ramp() -> None:
    raw = {"tokenizer": "t", "sources": [{"name": "a", "paths": ["a"]}], "global_batch_size": 32, "stages": [
        {"from_tokens": 100, "batch_ramp": {"to": 128, "add": 32, "every": 50}}, {"from_tokens": 200, "seq_len": 8},
    ]}  # fmt: skip
    config = DataConfig.model_validate(raw)
    found = [(change.at, *change[2:]) for change in changes(4, 32, config.stages)]
    assert found == [(100, 4, 64), (150, 4, 96), (200, 4, 128), (200, 8, 128)]
