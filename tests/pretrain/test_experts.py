"""Mixture of experts: the layer by its formula, and the same training however the experts are split."""

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from process_group import run_ranks
from tiny_run import VOCAB, assert_same_curve, tiny_batch, tiny_config, tiny_state, tiny_steps, with_kernels

from headrace.errors import ConfigError
from parallel import process_groups
from parallel.engine import dist_checkpointing, expert_losses
from parallel.layout import Layout, find_problem
from pretrain.checkpoint import model_identity, sharded_state
from pretrain.config import ModelConfig, RunConfig
from pretrain.convert.architecture import hf_family
from pretrain.models.sizes import count_parameters, flops_per_token, layout_shape
from pretrain.step import StepResult, evaluate_step, train_step

EXPERTS: dict[str, Any] = {"num_experts": 4, "moe_top_k": 2, "moe_ffn_hidden_size": 48, "micro_batch_size": 1}


def test_the_layer_is_its_formula() -> None:
    state = tiny_state(tiny_config(**EXPERTS, moe_shared_ffn_hidden_size=32), Layout(1))
    built = sum(parameter.numel() for parameter in state.chunks[0].parameters())
    assert built == count_parameters(state.config.model, VOCAB)
    layer = state.chunks[0].decoder.layers[1].mlp
    x = torch.randn(50, 1, 64, generator=torch.Generator().manual_seed(1)) * 3

    def mlp(module: Any, x: torch.Tensor) -> torch.Tensor:
        gate, up = (x @ module.linear_fc1.weight.T).chunk(2, dim=-1)
        return (F.silu(gate) * up) @ module.linear_fc2.weight.T

    with torch.no_grad():
        out, bias = layer(x)
        expected = mlp(layer.shared_experts, x[:, 0])
        best, chosen = (x[:, 0] @ layer.router.weight.T).topk(2, dim=1)
        for token, (weights, experts) in enumerate(zip(best.softmax(1), chosen.tolist(), strict=True)):
            for weight, expert in zip(weights, experts, strict=True):
                expected[token] += weight * mlp(layer.experts.local_experts[expert], x[token, 0])
    assert bias is None
    assert len(set(chosen.flatten().tolist())) == 4
    torch.testing.assert_close(out[:, 0], expected, rtol=1e-4, atol=1e-6)
    process_groups.shutdown()


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_model_that_was_trained_is_freed(recompute: str) -> None:
    """A run that goes on in another layout has the old model in memory otherwise."""

    def trained() -> "weakref.ref[Any]":
        state = tiny_state(tiny_config(**EXPERTS, recompute=recompute), Layout(1))
        train_step(state, tiny_batch(0, micro_batch_size=1), 1e-3)
        process_groups.shutdown()
        return weakref.ref(state.chunks[0])

    model = trained()
    gc.collect()
    assert model() is None
    assert expert_losses() == {}  # which would keep the groups of the layout before


def test_the_balancing_loss_is_minimised_and_not_reported() -> None:
    with_loss, without = (tiny_steps(tiny_config(**EXPERTS, moe_aux_loss=c), Layout(1), 2) for c in (0.1, 0.0))
    assert with_loss[0].loss == without[0].loss
    assert with_loss[0].grad_norm != without[0].grad_norm
    assert with_loss[1].loss != without[1].loss


LAYOUTS = {
    "dp2": Layout(2),
    "ep2": Layout(2, expert_parallel_size=2),
    "ep2 distributed optimizer, overlap": Layout(
        2,
        expert_parallel_size=2,
        distributed_optimizer=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
    ),
    "pp2": Layout(2, pipeline_parallel_size=2),
    "ep2 tp2+sp": Layout(4, tensor_parallel_size=2, sequence_parallel=True, expert_parallel_size=2),
    "ep2 over cp2": Layout(2, context_parallel_size=2, expert_parallel_size=2),
}


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_has_the_single_process_curve(name: str) -> None:
    config, layout = tiny_config("qwen3", **EXPERTS, moe_shared_ffn_hidden_size=32, moe_aux_loss=0.1), LAYOUTS[name]
    results = run_ranks(layout.world_size, tiny_steps, config, layout, 3, timeout_s=120)
    for other in results[1:]:
        assert [result.loss for result in other] == [result.loss for result in results[0]]
        assert [result.grad_norm for result in other] == [result.grad_norm for result in results[0]]
    assert_same_curve(results[0], tiny_steps(config, Layout(1), 3))


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_nothing(recompute: str) -> None:
    # Recomputed whole, a block's norms are not joined to the additions before them.
    plain, again = (
        tiny_steps(with_kernels(tiny_config(**EXPERTS, recompute=how), residual_norm="torch"), Layout(1), 2)
        for how in ("none", recompute)
    )
    assert [(one.loss, one.grad_norm) for one in again] == [(one.loss, one.grad_norm) for one in plain]


def part(config: RunConfig, layout: Layout, folder: Path, first: int, last: int) -> list[StepResult]:
    """Steps `first` to `last`, from a checkpoint and into one more."""
    state = tiny_state(config, layout)
    if first:
        loaded = dist_checkpointing.load(sharded_state(state, loading=True), str(folder / str(first)))
        state.chunks[0].load_state_dict(loaded["model"])
        state.optimizer.load_state_dict(loaded["optimizer"])
    results = [
        train_step(state, tiny_batch(step, state.ranks.dp_rank, state.ranks.dp_size, 1), 1e-3)
        for step in range(first, last)
    ]
    target = folder / str(last)
    target.mkdir(exist_ok=True)
    dist_checkpointing.save(sharded_state(state), str(target))
    if layout.world_size == 1:
        process_groups.shutdown()
    return results


@pytest.mark.multiprocess
@pytest.mark.parametrize("sharded", [False, True], ids=["plain", "distributed optimizer"])
def test_a_checkpoint_goes_from_two_expert_ranks_to_one_and_back(sharded: bool, tmp_path: Path) -> None:
    config = tiny_config(**EXPERTS)
    two = Layout(2, expert_parallel_size=2, distributed_optimizer=sharded)
    one = Layout(1, distributed_optimizer=sharded)
    results = run_ranks(2, part, config, two, tmp_path, 0, 2, timeout_s=120)[0]
    results += part(config, one, tmp_path, 2, 4)
    results += run_ranks(2, part, config, two, tmp_path, 4, 6, timeout_s=120)[0]
    assert_same_curve(results, tiny_steps(config, Layout(1), 6))


def test_what_does_not_fit_is_refused() -> None:
    config = tiny_config(**EXPERTS, moe_shared_ffn_hidden_size=32)
    shape = layout_shape(config, 128)

    def problem(**sizes: Any) -> str:
        return find_problem(Layout(4, **sizes), shape) or ""

    assert problem(expert_parallel_size=2) == problem(expert_parallel_size=4) == ""
    assert "num_experts 4 with tensor_parallel_size 2 needs sequence_parallel" in problem(tensor_parallel_size=2)
    assert "expert_parallel_size 3 does not divide the 4 processes" in problem(expert_parallel_size=3)
    sizes = {"tensor_parallel_size": 2, "sequence_parallel": True}
    assert problem(**sizes, expert_parallel_size=4) == ""
    odd = replace(shape, moe_shared_ffn_hidden_size=33)
    assert "moe_shared_ffn_hidden_size 33 is not a multiple" in (find_problem(Layout(4, **sizes), odd) or "")
    three = replace(shape, num_experts=3)
    assert "num_experts 3 is not a multiple" in (find_problem(Layout(2, expert_parallel_size=2), three) or "")
    for kind in ("sgd", "muon"):
        with pytest.raises(ConfigError, match=f"optimizer.kind: {kind} does not know experts"):
            tiny_config(kind=kind, num_experts=4)
    with pytest.raises(ConfigError, match="wonton family has biases"):
        tiny_config("wonton", **EXPERTS)
    with pytest.raises(ConfigError, match="moe_top_k 5 is more than num_experts 4"):
        tiny_config(**{**EXPERTS, "moe_top_k": 5})
    with pytest.raises(ConfigError, match="need num_experts"):
        tiny_config(moe_ffn_hidden_size=48)
    with pytest.raises(ConfigError, match="cannot be converted"):
        hf_family(config.model)


def test_sizes_of_a_known_model() -> None:
    # Mixtral 8x7B (arXiv 2401.04088): 47 billion weights, 13 billion of them active for a token.
    config = ModelConfig(
        family="llama",
        num_layers=32,
        hidden_size=4096,
        num_attention_heads=32,
        num_query_groups=8,
        ffn_hidden_size=14336,
        num_experts=8,
    )
    assert count_parameters(config, 32000) / 1e9 == pytest.approx(46.7, rel=0.002)
    full, causal = flops_per_token(config, 32000, 0)
    assert full == causal
    assert full / 6e9 + 32000 * 4096 / 1e9 == pytest.approx(12.9, rel=0.002)


def test_a_dense_models_checkpoints_know_nothing_of_experts() -> None:
    dense = model_identity(tiny_config().model, 128, "fp32")
    assert all(value is None for key, value in dense.items() if key.startswith(("moe", "num_experts")))
    assert model_identity(tiny_config(**EXPERTS).model, 128, "fp32")["moe_top_k"] == 2


@pytest.mark.multiprocess
def test_evaluation_has_no_balancing_loss() -> None:
    def evaluate(layout: Layout) -> list[int]:
        state = tiny_state(tiny_config(**EXPERTS), layout)
        sums, _ = evaluate_step(state, tiny_batch(0, state.ranks.dp_rank, state.ranks.dp_size, 1))
        if layout.world_size == 1:
            process_groups.shutdown()
        return sums.tolist()

    assert run_ranks(2, evaluate, Layout(2, expert_parallel_size=2))[0] == pytest.approx(evaluate(Layout(1)), rel=1e-6)
