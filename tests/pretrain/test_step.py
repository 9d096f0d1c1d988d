"""Training steps. That every layout trains as one process does is in `test_equivalence.py`."""

import math

import numpy as np
import pytest
import torch
from process_group import run_ranks
from tiny_run import (
    PAIRS,
    VOCAB,
    assert_same_curve,
    single_process,
    tiny_batch,
    tiny_config,
    tiny_state,
    tiny_steps,
    with_kernels,
)

from parallel import process_groups
from parallel.layout import Layout
from pretrain.loss import FIXED_POINT
from pretrain.step import evaluate_step, place, train_step


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ["dp2", "tp2+sp", "pp2", "cp2"])
def test_weighted_tokens_have_the_single_process_curve(name: str) -> None:
    layout, config = PAIRS[name], tiny_config("llama", micro_batch_size=1)
    results = run_ranks(layout.world_size, tiny_steps, config, layout, 3, True)[0]
    assert_same_curve(results, tiny_steps(config, Layout(1), 3, True))


@pytest.mark.multiprocess
def test_bf16_under_two_layouts_stays_near_fp32() -> None:
    config = tiny_config("llama", micro_batch_size=1, precision="bf16")
    reference = single_process(tiny_config("llama", micro_batch_size=1))
    single = tiny_steps(config, Layout(1))
    sharded = run_ranks(2, tiny_steps, config, PAIRS["dp2 distributed optimizer"])[0]
    for fp32, bf16, bf16_sharded in zip(reference, single, sharded, strict=True):
        assert bf16.loss == pytest.approx(fp32.loss, rel=5e-3)
        assert bf16.loss != fp32.loss
        assert bf16_sharded.loss == pytest.approx(bf16.loss, rel=1e-3)


@pytest.mark.parametrize("family", ["wonton", "llama"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_nothing(family: str, recompute: str) -> None:
    # Norms as torch computes them: ours is one pass with the addition before it, but where blocks are recomputed whole.
    plain, again = (
        with_kernels(tiny_config(family, recompute=each), residual_norm="torch") for each in ("none", recompute)
    )
    for mine, reference in zip(tiny_steps(again, Layout(1)), single_process(plain), strict=True):
        assert mine.loss == reference.loss
        assert mine.grad_norm == reference.grad_norm


@pytest.mark.parametrize("micro_batch_size", [1, 4, 8])
def test_micro_batch_size_changes_rounding_only(micro_batch_size: int) -> None:
    config = tiny_config("llama")
    other = tiny_config("llama", micro_batch_size=micro_batch_size)
    assert_same_curve(tiny_steps(other, Layout(1)), single_process(config))


def test_a_repeated_run_is_bit_identical() -> None:
    first, again = (tiny_steps(tiny_config("wonton"), Layout(1)) for _ in range(2))
    assert [result.source_loss_sums.tolist() for result in first] == [r.source_loss_sums.tolist() for r in again]
    assert [result.grad_norm for result in first] == [result.grad_norm for result in again]


@pytest.mark.parametrize("weighted", [False, True])
def test_the_gradient_is_of_the_mean_over_all_tokens_that_count(weighted: bool) -> None:
    # The fused head leaves gradients where data parallelism sums them up, where torch.autograd.grad does not look.
    state = tiny_state(with_kernels(tiny_config("llama"), head="torch", embedding="torch"), Layout(1))
    batch = tiny_batch(0, weighted=weighted)
    counts = {int(microbatch.loss_mask.sum()) for microbatch in batch}
    assert len(counts) > 1  # with equal counts a mean of means would be the same
    total, reported = torch.zeros(()), torch.zeros(())
    for placed in (place(microbatch, state) for microbatch in batch):
        plain, minimised = state.chunks[0](
            placed.input_ids, placed.position_ids, None, labels=placed.labels, packed_seq_params=placed.documents
        )
        weights = torch.ones_like(minimised) if placed.loss_weights is None else placed.loss_weights
        total = total + (minimised * weights)[placed.loss_mask].sum()
        reported = reported + plain[placed.loss_mask].sum()
    tokens = sum(int(microbatch.loss_mask.sum()) for microbatch in batch)
    mean = total / tokens
    gradients = torch.autograd.grad(mean, list(state.chunks[0].parameters()))
    norm = float(torch.stack([gradient.norm() for gradient in gradients]).norm())
    result = train_step(state, batch, 1e-3)
    assert result.loss == pytest.approx(float(reported.detach()) / tokens, rel=1e-6)  # curves are not weighted
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)
    process_groups.shutdown()


def test_reported_losses_are_the_sources_own() -> None:
    config = tiny_config("llama")
    state = tiny_state(config, Layout(1))
    batch = tiny_batch(0)
    sums, tokens = evaluate_step(state, batch)
    for source in range(2):
        alone = [microbatch for microbatch in tiny_batch(0, micro_batch_size=1) if microbatch.source_ids[0] == source]
        source_sums, source_tokens = evaluate_step(state, alone)
        assert source_tokens[source] == tokens[source] == sum(int(each.loss_mask.sum()) for each in alone)
        assert source_sums[source] == pytest.approx(sums[source], rel=1e-6)
    result = train_step(state, batch, 1e-2)
    assert result.source_loss_sums.tolist() == sums.tolist()
    assert result.loss == sums.sum() / tokens.sum() / FIXED_POINT
    process_groups.shutdown()


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ["dp2", "tp2+sp", "pp2", "pp2 interleaved", "cp2"])
def test_evaluation_changes_nothing_and_agrees_with_one_process(name: str) -> None:
    layout, config = PAIRS[name], tiny_config("llama", micro_batch_size=1)

    def evaluate(layout: Layout) -> tuple[list[int], list[int], float]:
        state = tiny_state(config, layout)
        batch = tiny_batch(0, state.ranks.dp_rank, state.ranks.dp_size, 1)
        sums, tokens = evaluate_step(state, batch)
        loss = train_step(state, batch, 1e-2).loss
        if layout.world_size == 1:
            process_groups.shutdown()
        return sums.tolist(), tokens.tolist(), loss

    sums, tokens, loss = evaluate(Layout(1))
    for other_sums, other_tokens, other_loss in run_ranks(layout.world_size, evaluate, layout):
        assert other_tokens == tokens
        assert other_sums == pytest.approx(sums, rel=1e-6)
        assert other_loss == pytest.approx(loss, rel=1e-6)


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone() -> None:
    state = tiny_state(tiny_config("llama"), Layout(1))
    train_step(state, tiny_batch(0), 1e-2)
    norm = state.chunks[0].decoder.final_layernorm.weight
    with torch.no_grad():
        norm[0] = float("inf")
    before = {name: value.clone() for name, value in state.chunks[0].named_parameters()}
    result = train_step(state, tiny_batch(1), 1e-2)
    assert result.skipped
    assert math.isnan(result.loss)
    assert not math.isfinite(result.grad_norm)
    assert all(torch.equal(before[name], value) for name, value in state.chunks[0].named_parameters())
    with torch.no_grad():
        norm[0] = 1.0
    after = train_step(state, tiny_batch(1), 1e-2)
    assert not after.skipped
    assert math.isfinite(after.loss)
    process_groups.shutdown()


def test_losses_fall_on_a_repeated_batch() -> None:
    state = tiny_state(tiny_config("wonton"), Layout(1))
    losses = [train_step(state, tiny_batch(0), 1e-2).loss for _ in range(30)]
    assert losses[0] == pytest.approx(np.log(VOCAB), rel=0.02)
    assert losses[-1] < 0.5 * losses[0]
    process_groups.shutdown()
