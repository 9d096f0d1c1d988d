"""Optimizer state in the form checkpoints keep it, the same for fully sharded and for whole weights.

Under bf16 megatron's optimizer keeps fp32 copies of bf16 weights, and stores both. Fully sharded weights are fp32
themselves, which its optimizer takes for a run in fp32. So that either kind of run can go on from the other's
checkpoint, their fp32 values are stored a second time under the names of those copies, the weights as bf16.
"""

from typing import Any

import torch

from parallel.engine import make_sharded_optimizer_tensor, nested_values
from pretrain.optimizer import restore
from pretrain.step import TrainState

MASTER = "fp32_from_fp16_params"
"""megatron's name for the copies, lists of tensors by parameter group."""


def stored_optimizer(state: TrainState, weights: dict[str, Any], metadata: dict[str, Any], loading: bool) -> Any:
    """megatron's sharded state dict of the optimizer, given that of all weights."""
    optimizer = state.optimizer.sharded_state_dict(weights, is_loading=loading, metadata=metadata)
    if not _stores_master_weights(state):
        return optimizer
    by_id = {id(entry.data): entry for entry in nested_values(weights)}
    master = [
        [make_sharded_optimizer_tensor(by_id[id(shard)], shard, "optimizer.state.fp32_param") for shard in shards]
        for shards in _groups(state)
    ]
    return {"optimizer": optimizer, MASTER: master}


@torch.no_grad()
def restore_optimizer(state: TrainState, loaded: dict[str, Any]) -> None:
    """Take over what was loaded through `stored_optimizer`; the weights must have been before."""
    if not _stores_master_weights(state):
        restore(state.optimizer, loaded)
        return
    restore(state.optimizer, loaded["optimizer"])
    for shards, values in zip(_groups(state), loaded[MASTER], strict=True):
        for shard, value in zip(shards, values, strict=True):
            shard.copy_(value)


def _stores_master_weights(state: TrainState) -> bool:
    return state.layout.fully_sharded and state.config.train.precision == "bf16"


def _groups(state: TrainState) -> list[list[torch.Tensor]]:
    return [group["params"] for group in state.optimizer.param_groups]
