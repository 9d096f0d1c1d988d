"""Trainable parts: the rest is frozen bit for bit, in every layout, and the run is the single process's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from process_group import run_ranks
from tiny_run import tiny_batch, tiny_config, tiny_state

from data_scheduler.state import State
from headrace.errors import ConfigError
from parallel.layout import Layout
from parallel.parameter_names import parameter_names
from pretrain import checkpoint
from pretrain.config import RunConfig, validate_config
from pretrain.step import StepResult, TrainState, train_step

PARTS = ["decoder.layers.[12].mlp.*", "embedding*"]
THEN = [None, PARTS, ["decoder.layers.*norm.weight"], ["*"]]
"""Trainable parts of steps 0, 1, ... ; all at first, so that there are moments."""


def config_of(tie: bool = True, **changes: Any) -> RunConfig:
    raw = tiny_config(tie_embeddings=tie, **changes).model_dump()
    raw["data"].pop("stages")
    stages = [{"from_step": step, "trainable": part} for step, part in enumerate(THEN) if part]
    return validate_config(raw | {"stages": stages}, "test")


def whole(state: TrainState) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for parameter, name in parameter_names(state.chunks).items()}


def moments(state: TrainState) -> list[tuple[torch.Tensor, ...]]:
    """Of each parameter: (master, exp_avg, exp_avg_sq), as the optimizer holds it."""
    adam = state.optimizer.chained_optimizers[0].optimizer
    return [
        (master.detach().clone(), *(adam.state[master][key].clone() for key in KEYS))
        for group in adam.param_groups
        for master in group["params"]
    ]


KEYS = ("exp_avg", "exp_avg_sq")


def steps(config: RunConfig, layout: Layout, first: int = 0, load: Path | None = None, save: Path | None = None) -> Any:
    """(results, changed names of each step) of a run through all parts, from `first` on."""
    state = tiny_state(config, layout)
    if load is not None:
        checkpoint.load(load, state)
    results: list[StepResult] = []
    changed: list[list[str]] = []
    for step in range(first, len(THEN)):
        if step == 2 and save is not None:
            data_state = State.fresh(8, ["code", "prose"]).to_dict(0, 1)
            checkpoint.Checkpoints(save).save(state, data_state, checkpoint.Progress(2, 0))
        part = THEN[step]
        state.stage = state.stage._replace(trainable=part and tuple(part))
        before, held = whole(state), moments(state) if step else []
        size = config.train.micro_batch_size
        results.append(train_step(state, tiny_batch(step, state.ranks.dp_rank, state.ranks.dp_size, size), 1e-3))
        after = whole(state)
        changed.append(sorted(name for name in before if not torch.equal(before[name], after[name])))
        # What the optimizer holds of a parameter moves as a whole or not at all.
        for old, new in zip(held, moments(state), strict=bool(held)):
            same = [torch.equal(a, b) for a, b in zip(old, new, strict=True)]
            assert old[0].numel() == 0 or all(same) or not any(same[1:])
            if held and part == PARTS and not same[0]:
                assert not any(same)
    return [(result.loss, result.grad_norm) for result in results], changed


@pytest.fixture(scope="module")
def alone() -> Any:
    return run_ranks(1, steps, config_of(), Layout(1), timeout_s=120)[0]


def test_only_what_is_named_moves(alone: Any) -> None:
    _, changed = alone
    assert changed[0] == changed[3]
    assert len(changed[0]) == 4 * 6 + 2
    mlps = [f"decoder.layers.{layer}.mlp.linear_fc{n}.weight" for layer in (1, 2) for n in (1, 2)]
    assert changed[1] == [*mlps, "embedding.word_embeddings.weight"]
    norms = [f"decoder.layers.{n}.{kind}_layernorm.weight" for n in range(4) for kind in ("input", "pre_mlp")]
    assert changed[2] == norms


@pytest.mark.multiprocess
def test_the_gradient_norm_counts_what_is_trainable() -> None:
    """Also where a pipeline stage has nothing to train."""

    def norms(layout: Layout) -> list[float]:
        state = tiny_state(config_of(tie=False), layout)
        found = []
        for part in (["embedding*"], ["decoder*", "output*"], ["*"]):
            state.stage = state.stage._replace(trainable=tuple(part))
            found.append(train_step(state, tiny_batch(0), 1e-30).grad_norm)
        return found

    ((one, other, both),) = run_ranks(1, norms, Layout(1), timeout_s=120)
    assert both == pytest.approx((one**2 + other**2) ** 0.5, rel=1e-5)
    assert min(one, other) > 0.01 * both
    for found in run_ranks(2, norms, Layout(2, pipeline_parallel_size=2), timeout_s=120):
        assert found == pytest.approx([one, other, both], rel=1e-5)


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "layout",
    [
        Layout(2, tensor_parallel_size=2, sequence_parallel=True),
        Layout(2, pipeline_parallel_size=2),
        Layout(2, distributed_optimizer=True),
    ],
    ids=["tensor", "pipeline", "distributed optimizer"],
)
def test_every_layout_freezes_the_same(alone: Any, layout: Layout) -> None:
    results, changed = alone
    found = run_ranks(2, steps, config_of(), layout, timeout_s=120)
    for own, expected in zip(found[0][0], results, strict=True):
        assert own == pytest.approx(expected, rel=1e-5)
    for step, names in enumerate(changed):
        assert sorted({name for _, each in found for name in each[step]}) == names


def test_a_run_is_resumed_in_a_stage_with_frozen_parts(alone: Any, tmp_path: Path) -> None:
    run_ranks(1, lambda: steps(config_of(), Layout(1), save=tmp_path), timeout_s=120)
    path = checkpoint.Checkpoints(tmp_path).path(2)
    results, _ = run_ranks(1, lambda: steps(config_of(), Layout(1), 2, load=path), timeout_s=120)[0]
    assert results == alone[0][2:]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("sharded", [False, True], ids=["plain", "distributed optimizer"])
def test_every_kind_of_optimizer_freezes_from_the_first_step_on_and_can_be_saved(
    tmp_path: Path, precision: str, sharded: bool
) -> None:
    def first_step() -> tuple[list[str], bool, int]:
        state = tiny_state(config_of(precision=precision), Layout(1, distributed_optimizer=sharded))
        state.stage = state.stage._replace(trainable=("embedding*",))
        before = whole(state)
        train_step(state, tiny_batch(0), 1e-2)
        changed = [name for name, weights in whole(state).items() if not torch.equal(weights, before[name])]
        data_state = State.fresh(8, ["code", "prose"]).to_dict(0, 1)
        path = checkpoint.Checkpoints(tmp_path).save(state, data_state, checkpoint.Progress(1, 0))
        expected = moments(state)
        checkpoint.load(path, state)
        same = all(
            torch.equal(a, b)
            for saved, loaded in zip(expected, moments(state), strict=True)
            for a, b in zip(saved, loaded, strict=True)
        )
        return changed, same, sum(bool(exp_avg.any()) for _, exp_avg, _ in expected)

    assert run_ranks(1, first_step, timeout_s=120) == [(["embedding.word_embeddings.weight"], True, 1)]


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    raw = config_of().model_dump()
    raw["stages"] = [{"from_step": 1, "trainable": ["*", "decoder.layers.4.*"]}]
    raw["data"].pop("stages")

    def build() -> str:
        try:
            tiny_state(validate_config(raw, "test"), Layout(1))
        except ConfigError as error:
            return str(error)
        return ""

    (said,) = run_ranks(1, build, timeout_s=120)
    assert said.startswith("stages.0.trainable: no parameter is called 'decoder.layers.4.*'; the nearest are decoder.")
    assert "\n" not in said
