"""`optimizer.groups`: parameters with a rate and a decay of their own, the same ones under every layout."""

from pathlib import Path

import pytest
import torch
from process_group import run_ranks
from resharding import save_then_go_on
from tiny_run import tiny_batch, tiny_config, tiny_state, tiny_steps

from headrace.errors import CheckpointError, ConfigError
from parallel import process_groups
from parallel.layout import Layout
from parallel.parameter_names import parameter_names
from pretrain import checkpoint
from pretrain.checkpoint import check_model
from pretrain.optimizer import restore, update
from pretrain.parameter_groups import factors
from pretrain.step import train_step

GROUPS = [
    {"match": "decoder.layers.3.*", "lr_scale": 0.1},
    {"match": "*layernorm.weight", "weight_decay": 0.05},
    {"match": "embedding.*", "lr_scale": 0.0},
]


def test_the_first_pattern_that_matches_decides_and_norms_are_not_decayed_by_default() -> None:
    config = tiny_config(groups=GROUPS, weight_decay=0.1)
    matrix, vector = torch.zeros(2, 2), torch.zeros(2)

    def of(name: str, parameter: torch.Tensor) -> tuple[float, float]:
        return tuple(factors(config.optimizer, config.model, name, parameter))

    assert of("decoder.layers.3.mlp.linear_fc1.weight", matrix) == (0.1, 1.0)
    assert of("decoder.layers.3.input_layernorm.weight", vector) == (0.1, 0.0)
    assert of("decoder.layers.2.input_layernorm.weight", vector) == (1.0, 0.5)
    assert of("decoder.final_layernorm.weight", vector) == (1.0, 0.5)
    assert of("decoder.layers.2.mlp.linear_fc1.weight", matrix) == (1.0, 1.0)
    assert of("decoder.layers.2.mlp.linear_fc1.bias", vector) == (1.0, 0.0)


@pytest.mark.parametrize("kind", ["adamw", "sgd", "muon"])
def test_groups_reach_every_kind_of_optimizer(kind: str) -> None:
    state = tiny_state(tiny_config(kind=kind, groups=GROUPS, weight_decay=0.1), Layout(1))
    names = parameter_names(state.chunks)
    before = {parameter: parameter.detach().clone() for parameter in names}
    train_step(state, tiny_batch(0), 1e-3)
    of = {id(parameter): group for group in state.optimizer.param_groups for parameter in group["params"]}
    for parameter, name in names.items():
        scale = 0.1 if ".layers.3." in name else 0.0 if name.startswith("embedding") else 1.0
        norm = 0.0 if ".layers.3." in name else 0.05
        assert of[id(parameter)]["lr"] == pytest.approx(1e-3 * scale)
        assert of[id(parameter)]["weight_decay"] == pytest.approx(norm if "norm" in name else 0.1)
        assert torch.equal(before[parameter], parameter) == (scale == 0.0)
    process_groups.shutdown()


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "layout",
    [
        Layout(2, pipeline_parallel_size=2),
        Layout(2, pipeline_parallel_size=2, virtual_pipeline_parallel_size=2),
        Layout(2, tensor_parallel_size=2),
        Layout(2, distributed_optimizer=True),
    ],
    ids=["pp2", "pp2 interleaved", "tp2", "dp2 distributed optimizer"],
)
def test_every_layout_finds_the_same_parameters(layout: Layout) -> None:
    config = tiny_config("qwen3", micro_batch_size=1, groups=GROUPS, weight_decay=0.5, lr=1e-2, tie_embeddings=True)
    reference = tiny_steps(config, Layout(1), 3)
    for mine, theirs in zip(run_ranks(2, tiny_steps, config, layout, 3, timeout_s=120)[0], reference, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=2e-5)
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)
    plain = tiny_config("qwen3", micro_batch_size=1, weight_decay=0.5, lr=1e-2, tie_embeddings=True)
    assert abs(tiny_steps(plain, Layout(1), 3)[-1].loss - reference[-1].loss) > 1e-3


@pytest.mark.multiprocess
@pytest.mark.parametrize("sharded", [False, True])
def test_a_resumed_run_takes_its_decay_and_betas_from_the_configuration(sharded: bool, tmp_path: Path) -> None:
    layout = Layout(2, distributed_optimizer=sharded)
    first, then = (
        tiny_config(groups=GROUPS, micro_batch_size=1, weight_decay=decay, beta1=beta1)
        for decay, beta1 in ((0.1, 0.9), (0.2, 0.8))
    )

    def settings() -> set[tuple[float, float]]:
        state = tiny_state(then, layout)
        loaded = checkpoint._load(tmp_path / "a", checkpoint.sharded_state(state, loading=True), state)
        restore(state.optimizer, loaded["optimizer"])
        assert {group["step"] for group in state.optimizer.param_groups} == {2}
        update(state.optimizer, then.optimizer, 1e-3)
        return {(group["weight_decay"], group["betas"][0]) for group in state.optimizer.param_groups}

    run_ranks(2, save_then_go_on, first, layout, tmp_path / "a", 2, 0, timeout_s=120)
    assert run_ranks(2, settings, timeout_s=120)[0] == {(0.2, 0.8), (0.05, 0.8), (0.0, 0.8)}


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"optimizer.groups.1.match: no parameter is called 'decoder.layers.9.\*'"):
        tiny_state(tiny_config(groups=[{"match": "*"}, {"match": "decoder.layers.9.*"}]), Layout(1))
    process_groups.shutdown()
    with pytest.raises(ConfigError, match="weight_decay is 0 while a group has one"):
        tiny_config(groups=[{"match": "*", "weight_decay": 0.1}], weight_decay=0.0)
    state = tiny_state(tiny_config(groups=GROUPS), Layout(1))
    for key, saved in (("kind", "sgd"), ("groups", [])):
        own = state.config.optimizer.model_dump(mode="json", include={"kind", "groups"})
        with pytest.raises(CheckpointError, match=f"was saved with optimizer.{key}=.*a run keeps this setting"):
            check_model(tmp_path, {"optimizer": own | {key: saved}, "model": {}}, state)
    process_groups.shutdown()
