"""Puts our AdamW kernel into megatron-core's optimizers: plain, over 16-bit weights, or sharded (ZeRO-1).

megatron-core clips gradients, updates fp32 masters and copies them to the model's 16-bit weights in a pass each. With
the kernel all of it is one: the masters' optimizer is told where the model's bf16 weights are and writes them itself,
so megatron's own copy, which would write the same numbers again, is left out.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch

from parallel.adam import GroupStepAdam


def use_fused_adamw(optimizer: Any) -> int:
    """Let our kernel make the updates of every AdamW in `optimizer` (megatron's, a chain); the number of these."""
    parts = [part for part in optimizer.chained_optimizers if isinstance(part.optimizer, GroupStepAdam)]
    for part in parts:
        copies = dict(_copies(part))
        part.optimizer.use_fused(copies)
        masters = [*getattr(part, "fp32_from_float16_groups", ()), *getattr(part, "shard_fp32_from_float16_groups", ())]
        if copies and all(master in copies for master in chain(*masters)):
            part._copy_main_params_to_model_params = _copied_already
    return len(parts)


def fused_adams(optimizer: Any) -> list[GroupStepAdam] | None:
    """Every part's inner optimizer (megatron's chain, stubs left out), if each is an AdamW with our kernel."""
    inner = [part.optimizer for part in optimizer.chained_optimizers if part.optimizer is not None]
    return inner if all(isinstance(each, GroupStepAdam) and each.fused for each in inner) else None


def _copied_already() -> None: ...


def _copies(part: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(fp32 master, the bf16 numbers that are its copy). fp16 ones are left to megatron."""
    if hasattr(part, "shard_fp32_from_float16_groups"):  # megatron's DistributedOptimizer
        for model, master in _pairs(part.model_float16_groups, part.shard_fp32_from_float16_groups):
            if model.dtype == torch.bfloat16:
                # As its _copy_main_params_to_model_params has it: this rank's range of the buffer that is gathered.
                buffer, _, bucket = part.model_param_gbuf_map[model]
                place = part._get_model_param_range_map(model)["gbuf_world_in_bucket"]
                yield master, part.buffers[buffer].buckets[bucket].param_data.view(-1)[place.start : place.end]
    elif hasattr(part, "fp32_from_float16_groups"):
        for model, master in _pairs(part.float16_groups, part.fp32_from_float16_groups):
            if model.dtype == torch.bfloat16:
                yield master, model.detach()


def _pairs(models: Any, masters: Any) -> Iterator[tuple[Any, torch.Tensor]]:
    return zip(chain(*models), chain(*masters), strict=True)
