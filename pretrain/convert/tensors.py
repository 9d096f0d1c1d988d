"""Which rows of which native tensor each Hugging Face tensor is: pure arithmetic on a `ModelConfig`."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from pretrain.config import ModelConfig
from pretrain.models.sizes import attention_width, has_qk_norm, head_size, query_groups


class Part(NamedTuple):
    """A Hugging Face tensor. The native tensor's rows are `groups` equal groups of `units` equal units; this one has
    the units `start` to `stop` of every group."""

    name: str
    shape: tuple[int, ...]
    groups: int = 1
    units: int = 1
    start: int = 0
    stop: int = 1


class Native(NamedTuple):
    """A weight as the checkpoint holds it, and the Hugging Face tensors it consists of."""

    key: str
    layer: int | None
    """Index on the checkpoint tensor's first axis, which stacks layers; None when it has no such axis."""
    shape: tuple[int, ...]
    """Without the layer axis."""
    parts: tuple[Part, ...]


def native_tensors(model: ModelConfig, vocab_size: int) -> Iterator[Native]:
    """Every weight of a gated, bias-free RMSNorm model (`llama`, `qwen3`); `vocab_size` is the padded one."""
    hidden = model.hidden_size
    yield _whole("embedding.word_embeddings.weight", None, "model.embed_tokens.weight", (vocab_size, hidden))
    for layer in range(model.num_layers):
        yield from _layer(model, layer)
    yield _whole("decoder.final_layernorm.weight", None, "model.norm.weight", (hidden,))
    if not model.tie_embeddings:
        yield _whole("output_layer.weight", None, "lm_head.weight", (vocab_size, hidden))


def _layer(model: ModelConfig, layer: int) -> Iterator[Native]:
    hidden, ffn, size, groups = model.hidden_size, model.ffn_hidden_size, head_size(model), query_groups(model)
    here, there = "decoder.layers", f"model.layers.{layer}"
    attention, mlp = f"{here}.self_attention", f"{here}.mlp"

    yield _whole(f"{attention}.linear_qkv.layer_norm_weight", layer, f"{there}.input_layernorm.weight", (hidden,))
    # megatron keeps each key/value group together so that tensor parallelism can cut between groups.
    queries = model.num_attention_heads // groups  # of one group
    units = queries + 2
    qkv = (
        Part(f"{there}.self_attn.q_proj.weight", (groups * queries * size, hidden), groups, units, 0, queries),
        Part(f"{there}.self_attn.k_proj.weight", (groups * size, hidden), groups, units, queries, queries + 1),
        Part(f"{there}.self_attn.v_proj.weight", (groups * size, hidden), groups, units, queries + 1, units),
    )
    yield Native(f"{attention}.linear_qkv.weight", layer, (groups * units * size, hidden), qkv)
    if has_qk_norm(model):
        yield _whole(f"{attention}.q_layernorm.weight", layer, f"{there}.self_attn.q_norm.weight", (size,))
        yield _whole(f"{attention}.k_layernorm.weight", layer, f"{there}.self_attn.k_norm.weight", (size,))
    proj = (hidden, attention_width(model))
    yield _whole(f"{attention}.linear_proj.weight", layer, f"{there}.self_attn.o_proj.weight", proj)

    yield _whole(f"{mlp}.linear_fc1.layer_norm_weight", layer, f"{there}.post_attention_layernorm.weight", (hidden,))
    gate_up = (
        Part(f"{there}.mlp.gate_proj.weight", (ffn, hidden), 1, 2, 0, 1),
        Part(f"{there}.mlp.up_proj.weight", (ffn, hidden), 1, 2, 1, 2),
    )
    yield Native(f"{mlp}.linear_fc1.weight", layer, (2 * ffn, hidden), gate_up)
    yield _whole(f"{mlp}.linear_fc2.weight", layer, f"{there}.mlp.down_proj.weight", (hidden, ffn))


def _whole(key: str, layer: int | None, name: str, shape: tuple[int, ...]) -> Native:
    return Native(key, layer, shape, (Part(name, shape),))


def take(native: torch.Tensor, part: Part) -> torch.Tensor:
    """A copy of the rows of `native` that are `part`."""
    return _rows(native, part).clone(memory_format=torch.contiguous_format).view(part.shape)


def put(native: torch.Tensor, part: Part, tensor: torch.Tensor) -> None:
    """Write `tensor` into the rows of `native` that are `part`; the inverse of `take`."""
    rows = _rows(native, part)
    rows.copy_(tensor.reshape(rows.shape))


def _rows(native: torch.Tensor, part: Part) -> torch.Tensor:
    """A view, [groups, units taken, rows of a unit, ...]."""
    return native.unflatten(0, (part.groups, part.units, -1))[:, part.start : part.stop]
