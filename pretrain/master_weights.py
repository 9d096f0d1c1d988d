"""Master weights: what an optimizer updates in the place of each parameter of the model."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch

ATTRIBUTES = (
    ("model_float16_groups", "shard_fp32_from_float16_groups"),
    ("model_fp32_groups", "shard_fp32_groups"),
    ("float16_groups", "fp32_from_float16_groups"),
    ("fp32_from_fp32_groups", "fp32_from_fp32_groups"),
)
"""Of megatron-core's optimizers: groups of parameters, and of their master weights. The first two pairs are of its
DistributedOptimizer."""


def master_weights(optimizer: Any) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """(parameter of the model, its fp32 master weight) of all that this rank's `optimizer` updates.

    The master weight is the parameter itself where that is fp32, and under the distributed optimizer this rank's range
    of the parameter, flat.
    """
    for part in optimizer.chained_optimizers:
        if getattr(part, "is_stub_optimizer", False):
            continue
        pairs = [(models, masters) for models, masters in ATTRIBUTES if hasattr(part, models)]
        if pairs:
            for models, masters in pairs:
                yield from zip(chain(*getattr(part, models)), chain(*getattr(part, masters)), strict=True)
        else:
            yield from ((parameter, parameter) for group in part.param_groups for parameter in group["params"])
