"""Losses of every token of a batch by a forward pass alone."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from parallel import accelerator, process_groups
from parallel.context_parallel import context_parallel_index
from pretrain.loss import FIXED_POINT
from pretrain.microbatch import MicroBatch
from pretrain.selection import Float64
from pretrain.step import Placed, TrainState, run_schedule


@torch.no_grad()
def token_losses(state: TrainState, microbatches: Sequence[MicroBatch]) -> Float64:
    """float64[micro-batches, tokens]: the reported loss of every token in whole multiples of 1/FIXED_POINT, the same on
    every rank that holds a part of this model. Of `state` chunks and layout are used."""
    for chunk in state.wrapped:
        chunk.eval()
    found = run_schedule(state, microbatches, _forward_step, forward_only=True)
    tokens, cp = microbatches[0].input_ids.size(1), state.layout.context_parallel_size
    losses = torch.zeros(len(microbatches), tokens, dtype=torch.float32, device=accelerator.device())
    held: Any = slice(None)
    if cp > 1:
        held = context_parallel_index(tokens, microbatches[0].seq_len, cp, state.ranks.cp_rank).to(losses.device)
    for row, reported in zip(losses, found, strict=False):  # empty but on the last pipeline stage
        row[held] = reported
    shared = process_groups.share_with_model_parallel(losses).cpu().numpy().astype(np.float64)
    rounded: Float64 = np.rint(shared * FIXED_POINT) / FIXED_POINT
    return rounded


def _forward_step(inputs: Iterator[Placed], model: Any) -> tuple[Any, Any]:
    batch = next(inputs)
    output = model(batch.input_ids, batch.position_ids, None, labels=batch.labels, packed_seq_params=batch.documents)
    return output, partial(_reported, number=batch.loss_mask.sum(dtype=torch.int32))


def _reported(
    losses: tuple[torch.Tensor, torch.Tensor], number: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What megatron-core's schedules expect: a sum, a number of tokens, and the report, here every token's loss."""
    reported = losses[0].detach()
    return reported.sum(), number, reported[0]
