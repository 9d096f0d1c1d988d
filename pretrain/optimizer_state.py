"""Optimizer state of a checkpoint in the other form: plain, or sharded over data-parallel ranks (ZeRO-1).

megatron-core stores the same numbers either way, under names that differ for the fp32 weights alone:

    plain, fp32      model weights are the fp32 weights                                param_groups
    plain, bf16      optimizer.state.fp32_param.<weight>                     optimizer/param_groups
    distributed      optimizer.state.param.<weight>                          optimizer/param_groups
    all              optimizer.state.{exp_avg, exp_avg_sq}.<weight>

So the state is asked for as this run keeps it, under the names the file has.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parallel.engine import ShardedTensor, ShardedTensorFactory, dist_checkpointing, nested_values

PREFIX = "optimizer.state."


def fp32_weights_name(distributed: bool, precision: str) -> str:
    """What stands before a weight's name where its fp32 value is stored."""
    if distributed:
        return f"{PREFIX}param."
    return "" if precision == "fp32" else f"{PREFIX}fp32_param."


def load_from_other_form(path: Path, wanted: dict[str, Any], now: str, there: str) -> dict[str, Any]:
    """The state of a checkpoint as the optimizer that made `wanted` (its sharded state dict) keeps it.

    `now` and `there` are the names of fp32 weights in this run and in the file, see `fp32_weights_name`. What is loaded
    is megatron-core's to check: raises what it raises for files that do not fit.
    """
    for tensor in nested_values(wanted):
        if isinstance(tensor, ShardedTensor | ShardedTensorFactory) and now and tensor.key.startswith(now):
            tensor.key = there + tensor.key.removeprefix(now)
    # Under a name of its own: lists of parameter groups would be merged item by item with those of the file.
    loaded = dist_checkpointing.load({"state": wanted}, str(path))
    return _assembled(loaded["state"], loaded["optimizer"], wanted)


def _assembled(state: dict[Any, Any], common: Mapping[Any, Any], wanted: Mapping[Any, Any]) -> dict[Any, Any]:
    """Loaded tensors with the parameter groups of the file, as `wanted` has them."""
    if all(isinstance(key, int) for key in wanted):  # a chain of optimizers
        return {key: _assembled(state[key], common[key], part) for key, part in wanted.items()}
    groups = common["param_groups"] if "param_groups" in common else common["optimizer"]["param_groups"]
    if "param_state" in wanted:
        state["optimizer"] = {"param_groups": [_without_params(group) for group in groups]}
        state["param_state_sharding_type"] = wanted["param_state_sharding_type"]
    else:
        inner = state if "param_groups" in wanted else state["optimizer"]
        # `params` are numbers of this process's parameters, put there by the optimizer that made `wanted`.
        own = inner["param_groups"]
        inner["param_groups"] = [
            {**_without_params(group), "params": own[number]["params"] if number < len(own) else []}
            for number, group in enumerate(groups)
        ]
    if "grad_scaler" in common:
        state["grad_scaler"] = common["grad_scaler"]
    return state


def _without_params(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}
