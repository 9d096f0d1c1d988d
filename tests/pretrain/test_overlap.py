"""Communication that overlaps computation changes when things happen, and nothing else."""

import functools
from typing import Any

import pytest
import torch
from process_group import run_ranks
from tiny_run import tiny_batch, tiny_config, tiny_state, tiny_steps

import pretrain.data_parallel
from parallel.engine import DistributedDataParallelConfig
from parallel.layout import Layout
from pretrain.checkpoint import sharded_weights
from pretrain.step import train_step

SMALL_BUCKETS = functools.partial(DistributedDataParallelConfig, bucket_size=20_000)
"""The default of 40 million weights would put all of a tiny model into one bucket."""
BOTH = {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "options",
    [{"overlap_grad_reduce": True}, {"overlap_grad_reduce": True, "distributed_optimizer": True}, BOTH],
    ids=["gradients", "gradients, distributed optimizer", "gradients and weights"],
)
def test_overlap_has_the_single_process_curve(options: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    config, layout = tiny_config("llama", micro_batch_size=1, tie_embeddings=True), Layout(2, **options)
    expected = tiny_steps(config, Layout(1), 3)
    monkeypatch.setattr(pretrain.data_parallel, "DistributedDataParallelConfig", SMALL_BUCKETS)
    for result, one in zip(run_ranks(2, tiny_steps, config, layout, 3)[0], expected, strict=True):
        assert result.loss == pytest.approx(one.loss, rel=1e-5)
        assert result.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)


@pytest.mark.multiprocess
def test_what_a_checkpoint_reads_between_steps_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain.data_parallel, "DistributedDataParallelConfig", SMALL_BUCKETS)
    # Without clipping, since the gradient norm is summed in another order.
    config = tiny_config("llama", micro_batch_size=1, precision="bf16", clip_grad=0.0)

    def weights(layout: Layout) -> tuple[dict[str, torch.Tensor], int, float]:
        state = tiny_state(config, layout)
        dp = state.ranks.dp_rank, state.ranks.dp_size
        train_step(state, tiny_batch(0, *dp, 1), 1e-2)
        groups = len(state.wrapped[0].bucket_groups)
        sharded_weights(state)
        found: dict[str, Any] = {name: value.clone() for name, value in state.chunks[0].named_parameters()}
        return found, groups, train_step(state, tiny_batch(1, *dp, 1), 1e-2).loss

    (plain, _, loss), _ = run_ranks(2, weights, Layout(2, distributed_optimizer=True))
    for found, groups, next_loss in run_ranks(2, weights, Layout(2, **BOTH)):
        assert groups > 1
        assert next_loss == loss
        for name, value in found.items():
            assert torch.equal(value, plain[name]), name
