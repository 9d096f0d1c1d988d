"""Stages of a whole run: the same as stopping where one begins, changing the configuration, and going on."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import child_process
import pytest
import torch
from process_group import run_ranks
from small_run import STEPS, Make, curve, maker, run_to_end

from data_scheduler import DataConfig, batch_sha256
from data_scheduler.replay import replay
from headrace.errors import ConfigError, LayoutError
from launch.preflight import checked_config
from parallel.layout import Layout, validate
from pretrain import checkpoint
from pretrain.config import RunConfig, dump_config, load_config
from pretrain.convert.native import NativeReader
from pretrain.convert.tensors import native_tensors
from pretrain.convert.to_hf import to_hf
from pretrain.models.sizes import layout_shape
from pretrain.report import load_run, shape_turns
from pretrain.step import build_state
from pretrain.train import train

YARN: dict[str, Any] = {"kind": "yarn", "factor": 4.0, "original_seq_len": 32, "beta_fast": 4.0}
STAGES: list[dict[str, Any]] = [
    {"from_step": 3, "seq_len": 64, "rope_base": 500.0, "micro_batch_size": 1},
    {"from_step": 6, "global_batch_size": 16, "lr_scale": 0.5, "rope_scaling": YARN},
    {
        "from_step": 9,
        "seq_len": 48,
        "rope_base": 100.0,
        "weights": {"a": 1.0, "d": 1.0},
        "learning_rate": {"lr": 4e-3, "schedule": "constant"},
    },
]
SHAPES = [(32, 8)] * 3 + [(64, 8)] * 3 + [(64, 16)] * 3 + [(48, 16)] * 3


def staged_maker(data_config: Callable[..., DataConfig], root: Path) -> Make:
    """Makes the configuration of a small run in `root/<name>` that goes through STAGES."""
    return maker(
        data_config,
        root,
        data__lanes=16,
        model__tie_embeddings=False,
        train__eval_sequences=0,
        optimizer__schedule="constant",
        checkpoint__every=0,
        stages=STAGES,
    )


@pytest.fixture
def run_config(data_config: Callable[..., DataConfig], tmp_path: Path) -> Make:
    return staged_maker(data_config, tmp_path)


@pytest.fixture(scope="module")
def staged(data_config: Callable[..., DataConfig], tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run through all stages, without a stop; checkpoints where they begin."""
    config = staged_maker(data_config, tmp_path_factory.mktemp("staged"))(
        "run", checkpoint__every=3, checkpoint__keep_last=0, train__eval_sequences=2, train__eval_every=4
    )
    run_to_end(config)
    return config


def weights(config: RunConfig, step: int = STEPS) -> list[torch.Tensor]:
    path = checkpoint.Checkpoints(config.run.dir).path(step)
    natives = list(native_tensors(config.model, checkpoint.read_meta(path)["model"]["vocab_size"]))
    reader = NativeReader(path, natives)
    return [reader.read(native) for native in natives]


def training(config: RunConfig) -> list[dict[str, Any]]:
    return [record for record in curve(config) if "loss" in record]


def assert_same_run(one: RunConfig, other: RunConfig) -> None:
    assert training(one) == training(other)
    assert all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


def test_stages_are_what_changing_the_configuration_at_their_steps_is(run_config: Make, staged: RunConfig) -> None:
    sources = staged.data.model_dump()["sources"]
    curated = [source | {"weight": 1.0 if source["name"] in "ad" else 0.0} for source in sources]
    by_hand: dict[str, Any] = {"stages": []}
    for until, changes in (
        (3, {}),
        (6, {"data__seq_len": 64, "model__rope_base": 500.0, "train__micro_batch_size": 1}),
        (9, {"data__global_batch_size": 16, "optimizer__lr": 5e-3, "model__rope_scaling": YARN}),
        (12, {"data__seq_len": 48, "model__rope_base": 100.0, "data__sources": curated, "optimizer__lr": 2e-3}),
    ):
        by_hand |= changes
        run_to_end(run_config("by hand", **by_hand, train__steps=until))
    assert_same_run(staged, run_config("by hand"))
    records = training(staged)
    assert [(record["seq_len"], record["global_batch_size"]) for record in records] == SHAPES
    assert [record["lr"] for record in records] == [5e-3] + [1e-2] * 5 + [5e-3] * 3 + [2e-3] * 3
    # Exact counts: what the model was given, and below it what of that was a target.
    given = [sum(length * size for length, size in SHAPES[: step + 1]) for step in range(STEPS)]
    assert [record["input_tokens"] for record in records] == given
    targets = [sum(record["source_tokens"].values()) for record in records]
    assert [record["tokens"] for record in records] == [sum(targets[: step + 1]) for step in range(STEPS)]
    assert all(0.9 * a * b < count <= a * b for (a, b), count in zip(SHAPES, targets, strict=True))
    assert shape_turns(load_run(staged.run.dir)) == [3, 6, 9]
    again = {batch.step: batch_sha256(batch.digests) for batch in replay(staged.run.dir, 0, STEPS - 1)}
    assert again == {record["step"]: record["batch_sha256"] for record in records}


def test_kill_9_within_stages_changes_nothing(run_config: Make, staged: RunConfig) -> None:
    killed = run_config("killed", train__eval_sequences=2, train__eval_every=4, checkpoint__every=2)
    log, metrics = Path(killed.run.dir).with_suffix(".log"), Path(killed.run.dir) / "metrics.jsonl"
    rng = random.Random(4)
    for _ in range(3):
        pid = child_process.start(lambda: train(killed), log)
        target = (len(metrics.read_bytes().splitlines()) if metrics.exists() else 0) + rng.randint(3, 6)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and os.waitpid(pid, os.WNOHANG) == (0, 0):
            if metrics.exists() and len(metrics.read_bytes().splitlines()) >= target:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                break
        else:
            break  # it finished
    text = run_to_end(killed)
    assert text.count("resuming") > 1
    assert_same_run(staged, killed)
    assert curve(staged) == curve(killed)
    assert [record["step"] for record in curve(staged) if "val_loss" in record] == [0, 4, 8, 12]


def test_a_checkpoint_is_converted_as_the_stage_it_was_trained_in(staged: RunConfig, tmp_path: Path) -> None:
    found = {}
    for step in (3, 6, 9, 12):
        folder = to_hf(Path(staged.run.dir), step, tmp_path / f"hf-{step}")
        written = json.loads((folder / "config.json").read_text())
        scaling = written.get("rope_scaling", {}).get("rope_type")
        found[step] = written["rope_theta"], written["max_position_embeddings"], scaling
    assert found == {3: (10000.0, 32, None), 6: (500.0, 64, None), 9: (500.0, 64, "yarn"), 12: (100.0, 48, "yarn")}


def go(config: RunConfig) -> int:
    return int(train(config))


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (2, {"tensor_parallel_size": 2, "sequence_parallel": True}),
        (2, {"pipeline_parallel_size": 2}),
        (2, {"context_parallel_size": 2}),
    ],
    ids=["tensor", "pipeline", "context"],
)
def test_every_layout_goes_through_the_stages_alike(
    run_config: Make, staged: RunConfig, world_size: int, parallel: dict[str, Any]
) -> None:
    config = run_config("ranks", **{f"parallel__{key}": value for key, value in parallel.items()})
    assert run_ranks(world_size, go, config) == [0] * world_size
    for record, expected in zip(training(config), training(staged), strict=True):
        for key in ("step", "batch_sha256", "tokens", "input_tokens", "seq_len", "global_batch_size", "lr"):
            assert record[key] == expected[key]
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.multiprocess
def test_more_ranks_once_the_batch_has_grown(run_config: Make) -> None:
    growing = [{"from_step": 5, "batch_ramp": {"to": 4, "multiply": 2, "every": 1}}]
    changes: dict[str, Any] = {"data__global_batch_size": 2, "train__micro_batch_size": 1, "stages": growing}
    alone = run_config("alone", **changes)
    run_to_end(alone)
    grown = run_config("grown", **changes)
    half = run_config("grown", **changes, train__steps=5)
    with pytest.raises(LayoutError, match=r"global_batch_size 2 is not a multiple of the data-parallel size 4"):
        validate(Layout(4), layout_shape(grown, 512))
    run_to_end(half)
    assert run_ranks(4, go, grown) == [0] * 4  # after 5 · 2 sequences: the first of the next step is rank 2's
    for record, expected in zip(curve(grown), curve(alone), strict=True):
        assert record["batch_sha256"] == expected["batch_sha256"]
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("world_size", "changes", "message"),
    [
        (3, {}, "global_batch_size 8 is not a multiple of the data-parallel size 3"),
        (8, {"train__micro_batch_size": 1, "stages": [{"from_step": 2, "global_batch_size": 12}]},
         "stages.0: global_batch_size 12 is not a multiple"),
        (4, {"stages": [{"from_step": 2, "micro_batch_size": 4}]}, "stages.0: global_batch_size 8 over data-parallel"),
        (2, {"parallel": {"context_parallel_size": 2}, "stages": [{"from_step": 2, "seq_len": 30}]},
         "stages.0: seq_len 30 is not a multiple of 2 x context_parallel_size 2"),
        (4, {"parallel": {"tensor_parallel_size": 2, "sequence_parallel": True}, "train__micro_batch_size": 1,
             "stages": [{"from_step": 2, "seq_len": 33}]}, "stages.0: micro_batch_size x seq_len = 33 tokens"),
        (2, {"parallel": {"context_parallel_size": 2}, "data__seq_len": 30, "train__eval_sequences": 2,
             "stages": [{"from_step": 0, "seq_len": 32}]}, "held-out data: seq_len 30 is not a multiple of 2 x"),
    ],
)  # fmt: skip
def test_layouts_that_a_stage_does_not_fit(
    run_config: Make, tmp_path: Path, world_size: int, changes: dict[str, Any], message: str
) -> None:
    config = run_config("run", **changes)
    (tmp_path / "run.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "run.yaml") == config
    with pytest.raises(LayoutError) as caught:
        checked_config(tmp_path / "run.yaml", [], world_size)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_model_is_made_for_the_longest_sequence_and_the_first_stage(run_config: Make) -> None:
    first = [{"from_step": 0, "seq_len": 16, "rope_base": 77.0}, *STAGES]
    config = run_config("run", stages=first)

    def build() -> tuple[int, float, int]:
        from parallel import process_groups

        layout = Layout(1)
        state = build_state(config, layout, process_groups.initialize(layout, 1), 512)
        return state.chunks[0].max_sequence_length, state.stage.rope_base, state.stage.seq_len

    assert run_ranks(1, build) == [(64, 77.0, 16)]


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"from_step": 1, "rope_base": 0.0}, "stages.0.rope_base: input should be greater than 0, got 0.0"),
        ({"from_step": 1, "rope_bsae": 2.0}, "unknown key stages.0.rope_bsae (did you mean 'rope_base'?)"),
        ({"from_step": 1, "seq_len": 0}, "stages.0.seq_len: input should be greater than or equal to 1, got 0"),
        ({"from_step": 1, "weights": {"x": 1.0}}, "data: stages.0.weights: no source 'x'"),
        ({"seq_len": 8}, "begins at one of from_step, from_tokens, from_share; this one has none"),
    ],
)
def test_mistakes_in_stages_are_named_once(run_config: Make, stage: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run_config("run", stages=[stage])
    assert message in str(caught.value)
    assert len(str(caught.value).split(";")) == 1 + message.count(";")


@pytest.mark.multiprocess
def test_a_stage_may_go_on_in_another_layout(run_config: Make, staged: RunConfig, tmp_path: Path) -> None:
    """Tensor parallel, then data parallel with sharded state, then pipeline parallel, in the same two processes."""
    layouts: list[dict[str, Any]] = [
        {"tensor_parallel_size": 2, "sequence_parallel": True},
        {"distributed_optimizer": True},
        {"pipeline_parallel_size": 2},
    ]
    rows = checkpoint.read_meta(checkpoint.Checkpoints(staged.run.dir).path(STEPS))["model"]["vocab_size"]
    stages = [stage | {"parallel": parallel} for stage, parallel in zip(STAGES, layouts, strict=True)]
    changes = {
        "train__eval_sequences": 2,
        "train__eval_every": 4,
        "checkpoint__keep_last": 0,
        "model__vocab_size": rows,
    }
    config = run_config("moving", stages=stages, **changes)
    assert run_ranks(2, go, config, timeout_s=240) == [0, 0]
    for record, expected in zip(curve(config), curve(staged), strict=True):
        assert record["step"] == expected["step"]
        if "val_loss" in record:
            assert record["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-5)
            continue
        for key in ("batch_sha256", "tokens", "input_tokens", "seq_len", "global_batch_size", "lr"):
            assert record[key] == expected[key]
        for key in ("loss", "grad_norm"):
            assert record[key] == pytest.approx(expected[key], rel=1e-5 if key == "loss" else 1e-4)
    saved = [
        checkpoint.read_meta(checkpoint.Checkpoints(config.run.dir).path(step))["layout"] for step in (3, 6, 9, 12)
    ]
    sizes = [(meta["tensor_parallel_size"], meta["pipeline_parallel_size"]) for meta in saved]
    assert sizes == [(1, 1), (2, 1), (1, 1), (1, 2)]
    # The run is over, and only the last layout is still ahead: of one process, it would be refused.
    with pytest.raises(LayoutError, match="1 process cannot be split into"):
        checked_config(Path(config.run.dir) / "config.yaml", [], 1)


def test_layouts_of_later_stages_are_checked_at_the_start(run_config: Make, tmp_path: Path) -> None:
    stages = [{"from_step": 2, "parallel": {"tensor_parallel_size": 4}}]
    config = run_config("run", stages=stages)
    (tmp_path / "run.yaml").write_text(dump_config(config))
    with pytest.raises(LayoutError) as caught:
        checked_config(tmp_path / "run.yaml", [], 4)
    assert str(caught.value).startswith("stages.0.parallel: ")
    assert "num_query_groups 2 is not a multiple of tensor_parallel_size 4" in str(caught.value)
