"""Bytes that stand between steps on each rank: weights, gradients and optimizer state.

plain              weights in the run's precision, gradients in fp32, and of the optimizer for each parameter
                       AdamW 8 bytes; SGD 4, without momentum none; Muon 4 for the blocks' matrices, else AdamW's 8
                       and 4 more of a master weight under bf16 and fp16
distributed        AdamW's state and master weights are cut over the ranks that share the parameters (ZeRO-1); with
optimizer          SGD and Muon each parameter's are its owner's (`parallel.owners`)
fully sharded      a rank has ceil(rows / ranks) rows of each weight, in fp32 also under bf16, their gradients and
                   AdamW's state; where gradients are reduced once a step whole ones (fp32) wait for it
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from parallel.layout import Layout
from parallel.owners import assign_owners
from parallel.parameter_names import BLOCKS, HEADS
from pretrain.config import OptimizerConfig
from pretrain.models.weights import Weight


class Standing(NamedTuple):
    """Bytes on the fullest rank; the others have less by padding, or by what others own."""

    weights: int
    gradients: int
    optimizer: int


def standing(
    chunks: Sequence[Sequence[Weight]], layout: Layout, optimizer: OptimizerConfig, itemsize: int, micro_batches: int
) -> Standing:
    """Of a rank with these model chunks; `itemsize`: bytes of a weight in the run's precision."""
    own = [weight for chunk in chunks for weight in chunk]
    parameters = sum(weight.numel for weight in own)
    ranks = layout.data_parallel_size * layout.context_parallel_size
    if layout.fully_sharded:
        held = sum(-(-weight.shape[0] // ranks) * weight.numel // weight.shape[0] for weight in own)
        whole = parameters if layout.reduce_gradients == "step" and micro_batches > 1 else 0
        return Standing(4 * held, 4 * held + 4 * whole, 8 * held)
    masters = 4 if itemsize == 2 else 0
    if layout.distributed_optimizer and optimizer.kind == "adamw":
        stored = state = 0
        for is_expert in (False, True):
            shards = _ranks_of_experts(layout) if is_expert else ranks
            for chunk in chunks:
                size = _buffer_size([weight for weight in chunk if weight.is_expert == is_expert], shards)
                stored += size
                state += size // shards * (8 + masters)
        return Standing(stored * itemsize, stored * 4, state)
    kept = [weight.numel * (_state_bytes(weight, optimizer) + masters) for weight in own]
    state = sum(kept)
    if layout.distributed_optimizer:
        order = sorted(range(len(own)), key=lambda index: not _is_block_matrix(own[index]))  # as Muon takes them
        of_rank = [0] * ranks
        for index, owner in zip(order, assign_owners([own[index].numel for index in order], ranks), strict=True):
            of_rank[owner] += kept[index]
        state = max(of_rank)
    return Standing(parameters * itemsize, parameters * 4, state)


def _state_bytes(weight: Weight, optimizer: OptimizerConfig) -> int:
    """Of a number, master weights left out."""
    if optimizer.kind == "sgd":
        return 4 if optimizer.momentum else 0
    return 4 if optimizer.kind == "muon" and _is_block_matrix(weight) else 8


def _is_block_matrix(weight: Weight) -> bool:
    """As `parallel.parameter_names.is_block_matrix`."""
    return weight.name.startswith((BLOCKS, HEADS)) and len(weight.shape) == 2


def _ranks_of_experts(layout: Layout) -> int:
    """Ranks that share the parameters of an expert; no tensor-parallel rank splits it."""
    return layout.world_size // (layout.pipeline_parallel_size * layout.expert_parallel_size)


def _buffer_size(weights: Sequence[Weight], shards: int) -> int:
    """Numbers in megatron-core's buffer for `weights` under the distributed optimizer: each begins at a multiple of 64,
    each bucket ends at one of 128 and of the ranks that share it (`_ParamAndGradBuffer`)."""
    divisor = math.lcm(shards, 128)
    at = 0
    for weight in reversed(weights):
        at = _up(_up(at, 64), divisor if weight.has_own_bucket else 1) + weight.numel
        at = _up(at, divisor) if weight.has_own_bucket else at
    return _up(at, divisor)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
