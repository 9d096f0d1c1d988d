"""Muon: its arithmetic, the matrices that are stored as one, who owns what, and every layout against one process."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from process_group import run_ranks
from resharding import load_then_go_on, save_then_go_on
from tiny_run import PAIRS, assert_same_curve, single_process, tiny_batch, tiny_config, tiny_state, tiny_steps

from parallel import process_groups
from parallel.fused_matrices import AttentionShape, Fusion, fusion_of, join, split
from parallel.layout import Layout
from parallel.muon import Muon
from parallel.newton_schulz import COEFFICIENTS, STEPS
from parallel.owners import assign_owners
from pretrain.step import train_step

ATTENTION = AttentionShape(queries_per_group=2, head_size=4)


def reference_update(direction: torch.Tensor) -> np.ndarray:
    """0.2·√max(rows, columns)·U·p(S)·Vᵀ in float64, p the five Newton-Schulz steps."""
    left, x, right = np.linalg.svd(direction.double().numpy(), full_matrices=False)
    x = x / np.sqrt((x**2).sum())
    for _ in range(STEPS):
        x = COEFFICIENTS[0] * x + COEFFICIENTS[1] * x**3 + COEFFICIENTS[2] * x**5
    return 0.2 * math.sqrt(max(direction.shape)) * (left @ np.diag(x) @ right)


@pytest.mark.parametrize("nesterov", [False, True])
def test_two_steps_by_hand(nesterov: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 10, generator=generator).requires_grad_()
    muon = Muon([weight], lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.5, attention=ATTENTION)
    expected, buffer = weight.detach().double().numpy().copy(), np.zeros((6, 10))
    for _ in range(2):
        weight.grad = torch.randn(6, 10, generator=generator)
        gradient = weight.grad.double().numpy()
        buffer = 0.9 * buffer + gradient
        direction = gradient + 0.9 * buffer if nesterov else buffer
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * reference_update(torch.from_numpy(direction))
        muon.step()
    np.testing.assert_allclose(weight.detach().numpy(), expected, atol=2e-5)
    np.testing.assert_allclose(muon.state[weight]["momentum_buffer"].numpy(), buffer, atol=1e-6)


def test_queries_keys_and_values_are_matrices_of_their_own() -> None:
    groups, columns = 3, 5
    rows = torch.arange(groups * 4 * 4.0).view(-1, 1).expand(-1, columns)
    query, key, value = split(rows, "qkv", ATTENTION)
    # Of each group of 16 rows, 8 are its two queries', then 4 its key's, then 4 its value's.
    assert query[:, 0].tolist() == [16.0 * group + row for group in range(groups) for row in range(8)]
    assert key[:, 0].tolist() == [16.0 * group + row for group in range(groups) for row in range(8, 12)]
    assert value[:, 0].tolist() == [16.0 * group + row for group in range(groups) for row in range(12, 16)]


@pytest.mark.parametrize("fusion", ["none", "qkv", "gate_up"])
def test_joining_is_the_inverse_of_splitting(fusion: Fusion) -> None:
    matrix = torch.randn(48, 5)
    assert torch.equal(join(split(matrix, fusion, ATTENTION), fusion, ATTENTION), matrix)


@pytest.mark.parametrize("fusion", ["qkv", "gate_up"])
def test_parts_of_a_fused_matrix_are_orthogonalised_alone(fusion: Fusion) -> None:
    weight = torch.zeros(48, 6).requires_grad_()
    weight.grad = torch.randn(48, 6, generator=torch.Generator().manual_seed(4))
    muon = Muon([{"params": [weight], "fusion": fusion}], 1.0, 0.0, False, 0.0, ATTENTION)
    muon.step()
    for part, gradient in zip(*(split(m.detach(), fusion, ATTENTION) for m in (weight, weight.grad)), strict=True):
        np.testing.assert_allclose(part.numpy(), -reference_update(gradient), atol=2e-5)


def test_which_matrices_are_fused() -> None:
    assert fusion_of("decoder.layers.0.self_attention.linear_qkv.weight", gated=False) == "qkv"
    assert fusion_of("decoder.layers.0.mlp.linear_fc1.weight", gated=True) == "gate_up"
    assert fusion_of("decoder.layers.0.mlp.linear_fc1.weight", gated=False) == "none"
    assert fusion_of("decoder.layers.0.mlp.linear_fc2.weight", gated=True) == "none"


def test_owners_share_the_weights_evenly() -> None:
    assert assign_owners([6, 5, 4, 3], 2) == [0, 1, 1, 0]
    assert assign_owners([1, 1], 4) == [0, 1]
    sizes = [int(size) for size in np.random.default_rng(0).integers(1, 100, 60)]
    owners = assign_owners(sizes, 7)
    loads = [sum(size for size, owner in zip(sizes, owners, strict=True) if owner == rank) for rank in range(7)]
    assert max(loads) - min(loads) <= max(sizes)


@pytest.mark.parametrize("family", ["wonton", "llama"])
def test_blocks_matrices_get_muon_and_everything_else_adamw(family: str) -> None:
    config = tiny_config(family, kind="muon", weight_decay=0.0, clip_grad=0.0, lr=1e-2)
    state = tiny_state(config, Layout(1))
    before = {name: value.detach().clone() for name, value in state.chunks[0].named_parameters()}
    train_step(state, tiny_batch(0), 1e-2)
    model = state.chunks[0].config
    attention = AttentionShape(model.num_attention_heads // model.num_query_groups, model.kv_channels)
    for name, value in state.chunks[0].named_parameters():
        moved, gradient = before[name] - value.detach(), value.main_grad
        if "layers" in name and value.dim() == 2:
            fusion = fusion_of(name, model.gated_linear_unit)
            for part, of in zip(split(moved, fusion, attention), split(gradient, fusion, attention), strict=True):
                np.testing.assert_allclose(part.numpy(), 1e-2 * reference_update(of), atol=3e-5)
        else:  # Adam's first step is lr·sign(gradient)
            clear = gradient.abs() > 1e-5
            np.testing.assert_allclose(moved[clear].numpy(), 1e-2 * gradient[clear].sign().numpy(), rtol=5e-3)
    process_groups.shutdown()


LAYOUTS = {name: layout for name, layout in PAIRS.items() if name not in ("pp2 interleaved", "cp2")} | {
    "dp2 tp2 distributed optimizer": Layout(4, tensor_parallel_size=2, distributed_optimizer=True),
}


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_has_the_single_process_curve(name: str) -> None:
    layout = LAYOUTS[name]
    config = tiny_config("llama", kind="muon", micro_batch_size=1, tie_embeddings=name == "pp2")
    ranks = run_ranks(layout.world_size, tiny_steps, config, layout, timeout_s=120)
    assert [result.loss for result in ranks[0]] == [result.loss for result in ranks[-1]]
    assert_same_curve(ranks[0], single_process(config))


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("before", "after"),
    [("tp2", None), ("dp2 distributed optimizer", None), ("dp2 distributed optimizer", "tp2+sp")],
)
def test_a_run_goes_on_under_another_layout(before: str, after: str | None, tmp_path: Path) -> None:
    config = tiny_config("llama", kind="muon", micro_batch_size=1)
    then = LAYOUTS[after] if after else Layout(1)
    expected = run_ranks(2, save_then_go_on, config, LAYOUTS[before], tmp_path / "a", 3, 2, timeout_s=120)[0]
    resumed = run_ranks(then.world_size, load_then_go_on, config, then, tmp_path / "a", 3, 2, timeout_s=120)[0]
    for mine, theirs in zip(resumed, expected, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-6)
    assert resumed[1].grad_norm == pytest.approx(expected[1].grad_norm, rel=1e-4)


@pytest.mark.multiprocess
def test_in_bf16_a_resumed_run_of_owners_is_bit_identical(tmp_path: Path) -> None:
    config = tiny_config("llama", kind="muon", micro_batch_size=1, precision="bf16")
    owned = LAYOUTS["dp2 distributed optimizer"]
    expected = run_ranks(2, save_then_go_on, config, owned, tmp_path / "a", 3, 2, timeout_s=120)[0]
    resumed = run_ranks(2, load_then_go_on, config, owned, tmp_path / "a", 3, 2, timeout_s=120)[0]
    assert [result.loss for result in resumed] == [result.loss for result in expected]
    single = tiny_steps(config, Layout(1))
    assert expected[0].loss == pytest.approx(single[3].loss, rel=2e-3)


@pytest.mark.multiprocess
def test_a_rank_holds_the_state_of_what_it_owns_alone() -> None:
    def held() -> tuple[int, int]:
        state = tiny_state(tiny_config(kind="muon", micro_batch_size=1), Layout(2, distributed_optimizer=True))
        train_step(state, tiny_batch(0, state.ranks.dp_rank, 2, 1), 1e-3)
        parts = [part.optimizer for part in state.optimizer.chained_optimizers]
        tensors = [tensor for part in parts for per in part.state.values() for tensor in per.values()]
        return sum(tensor.numel() for tensor in tensors), sum(p.numel() for p in state.chunks[0].parameters())

    (first, whole), (second, _) = run_ranks(2, held, timeout_s=120)
    assert abs(first - second) < 0.1 * whole
    assert whole < first + second < 2 * whole  # one tensor for each matrix, two for each other parameter
