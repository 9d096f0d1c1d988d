"""Which rows of which native tensor each Hugging Face tensor is: pure arithmetic on a `ModelConfig`."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from headrace.errors import CheckpointError
from pretrain.config import ModelConfig
from pretrain.models.sizes import FAMILIES, attention_width, has_qk_norm, head_size, query_groups


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
    """Every weight of a dense model; `vocab_size` is the padded one."""
    yield _whole("embedding.word_embeddings.weight", None, "model.embed_tokens.weight", (vocab_size, model.hidden_size))
    for layer in range(model.num_layers):
        yield from _layer(model, layer)
    yield from _norm(model, "decoder.final_layernorm.", None, "model.norm", model.hidden_size)
    if not model.tie_embeddings:
        yield _whole("output_layer.weight", None, "lm_head.weight", (vocab_size, model.hidden_size))


def _layer(model: ModelConfig, layer: int) -> Iterator[Native]:
    hidden, ffn, size, groups = model.hidden_size, model.ffn_hidden_size, head_size(model), query_groups(model)
    here, there = "decoder.layers", f"model.layers.{layer}"
    attention, mlp = f"{here}.self_attention", f"{here}.mlp"

    yield from _norm(model, f"{attention}.linear_qkv.layer_norm_", layer, f"{there}.input_layernorm", hidden)
    # megatron keeps each key/value group together so that tensor parallelism can cut between groups.
    queries = model.num_attention_heads // groups  # of one group
    units = queries + 2
    qkv = (
        Piece(f"{there}.self_attn.q_proj", groups, units, 0, queries),
        Piece(f"{there}.self_attn.k_proj", groups, units, queries, queries + 1),
        Piece(f"{there}.self_attn.v_proj", groups, units, queries + 1, units),
    )
    yield from _linear(model, f"{attention}.linear_qkv", layer, groups * units * size, hidden, qkv)
    if has_qk_norm(model):
        yield from _norm(model, f"{attention}.q_layernorm.", layer, f"{there}.self_attn.q_norm", size)
        yield from _norm(model, f"{attention}.k_layernorm.", layer, f"{there}.self_attn.k_norm", size)
    proj = Piece(f"{there}.self_attn.o_proj")
    yield from _linear(model, f"{attention}.linear_proj", layer, hidden, attention_width(model), (proj,))

    yield from _norm(model, f"{mlp}.linear_fc1.layer_norm_", layer, f"{there}.post_attention_layernorm", hidden)
    up = (Piece(f"{there}.mlp.up_proj"),)
    if FAMILIES[model.family].gated:
        up = (Piece(f"{there}.mlp.gate_proj", 1, 2, 0, 1), Piece(f"{there}.mlp.up_proj", 1, 2, 1, 2))
    yield from _linear(model, f"{mlp}.linear_fc1", layer, len(up) * ffn, hidden, up)
    yield from _linear(model, f"{mlp}.linear_fc2", layer, hidden, ffn, (Piece(f"{there}.mlp.down_proj"),))


class Piece(NamedTuple):
    """A Hugging Face linear layer and the rows it has of a native one, as `Part` has them."""

    name: str
    groups: int = 1
    units: int = 1
    start: int = 0
    stop: int = 1


def _linear(
    model: ModelConfig, key: str, layer: int, rows: int, columns: int, pieces: tuple[Piece, ...]
) -> Iterator[Native]:
    def native(kind: str, *rest: int) -> Native:
        parts = tuple(
            Part(f"{p.name}.{kind}", (rows // p.units * (p.stop - p.start), *rest), p.groups, p.units, p.start, p.stop)
            for p in pieces
        )
        return Native(f"{key}.{kind}", layer, (rows, *rest), parts)

    yield native("weight", columns)
    if FAMILIES[model.family].biases:
        yield native("bias")


def _norm(model: ModelConfig, prefix: str, layer: int | None, name: str, size: int) -> Iterator[Native]:
    yield _whole(f"{prefix}weight", layer, f"{name}.weight", (size,))
    if FAMILIES[model.family].normalization == "LayerNorm":
        yield _whole(f"{prefix}bias", layer, f"{name}.bias", (size,))


def _whole(key: str, layer: int | None, name: str, shape: tuple[int, ...]) -> Native:
    return Native(key, layer, shape, (Part(name, shape),))


def take(native: torch.Tensor, part: Part) -> torch.Tensor:
    """The rows of `native` that are `part`, contiguous: `native` itself where it has no others, else a copy."""
    return _rows(native, part).contiguous().view(part.shape)


def join(native: Native, read: Callable[[Part], torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The native tensor whose parts `read` gives, one at a time; the inverse of `take`."""
    if len(native.parts) == 1:
        return read(native.parts[0]).to(dtype).view(native.shape)
    whole = torch.empty(native.shape, dtype=dtype)
    for part in native.parts:
        put(whole, part, read(part))
    return whole


def put(native: torch.Tensor, part: Part, tensor: torch.Tensor) -> None:
    """Write `tensor` into the rows of `native` that are `part`."""
    rows = _rows(native, part)
    rows.copy_(tensor.reshape(rows.shape))


def check_finite(tensor: torch.Tensor, name: str) -> None:
    """Raise CheckpointError when there is a NaN or an infinity in `tensor`."""
    if math.isfinite(float(tensor.sum())):  # one pass and no copy
        return
    bad = int(tensor.numel() - torch.isfinite(tensor).sum())
    if bad:
        raise CheckpointError(f"{name} holds {bad} NaN or infinite of {tensor.numel()} values; the weights are damaged")


def _rows(native: torch.Tensor, part: Part) -> torch.Tensor:
    """A view, [groups, units taken, rows of a unit, ...]."""
    return native.unflatten(0, (part.groups, part.units, -1))[:, part.start : part.stop]
