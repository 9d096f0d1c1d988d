"""Starting weights that do not depend on the layout.

Every weight is drawn whole, from a generator seeded by (seed, its name in the checkpoint, its layer), and each process
keeps its slice. So a model starts from the same numbers however it is split, and a change of layout is no change of
experiment.
"""

import hashlib
import math
from collections.abc import Iterable
from typing import Any

import torch

from parallel.engine import ShardedTensor, apply_factories, nested_values, parallel_state
from pretrain.config import ModelConfig
from pretrain.models.mup import std_factor


@torch.no_grad()
def initialize_weights(chunks: Iterable[Any], config: ModelConfig, seed: int) -> None:
    """Fill in all parameters of `chunks`: GPT-2's scheme.

    Matrices from N(0, init_std²), those that write into the residual stream from N(0, init_std²/(2·layers)), norms 1,
    biases 0. Under muP the blocks' matrices start smaller (`pretrain.models.mup`).
    """
    metadata = {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "singleton_local_shards": False,
    }
    for chunk in chunks:
        sharded = chunk.sharded_state_dict(metadata=metadata)
        apply_factories(sharded)  # gated MLPs are stored as two halves; the data are views of the parameter
        filled = 0
        for tensor in nested_values(sharded):
            if not isinstance(tensor, ShardedTensor) or tensor.data is None or not tensor.data.is_floating_point():
                continue
            tensor.data.copy_(_initial_slice(tensor, config, seed))
            filled += tensor.data.numel()
        expected = sum(parameter.numel() for parameter in chunk.parameters())
        assert filled == expected, f"initialised {filled} of {expected} weights"


def _initial_slice(tensor: Any, config: ModelConfig, seed: int) -> torch.Tensor:
    """This process's part of the whole weight that `tensor` (a ShardedTensor) is a shard of; fp32 on the CPU."""
    layers = tensor.prepend_axis_num  # leading axes that stack layers in the checkpoint; each layer has its own draw
    layer, offset = tensor.global_offset[:layers], tensor.global_offset[layers:]
    shape, local = tensor.global_shape[layers:], tensor.local_shape
    kind, std = _distribution(tensor.key, config)
    if kind != "normal":
        return torch.full(local, 1.0 if kind == "one" else 0.0)
    digest = hashlib.sha256(f"{seed}:{tensor.key}:{layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    whole = torch.randn(shape, generator=generator, dtype=torch.float32)
    return whole[tuple(slice(start, start + size) for start, size in zip(offset, local, strict=True))] * std


def _distribution(key: str, config: ModelConfig) -> tuple[str, float]:
    """("normal", standard deviation), ("one", 0) or ("zero", 0) for the weight called `key`."""
    if key.endswith("bias"):
        return "zero", 0.0
    if "norm" in key:
        return "one", 0.0
    if "linear_proj" in key or "linear_fc2" in key:
        return "normal", std_factor(config, key) * config.init_std / math.sqrt(2 * config.num_layers)
    return "normal", std_factor(config, key) * config.init_std
