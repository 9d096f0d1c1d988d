"""Matrices that megatron-core stores as one, taken apart and put together again.

    linear_qkv   rows of each query group in turn: its queries, its key, its value     -> Q, K, V
    linear_fc1   with a gated MLP: all gate rows, then all up rows                     -> gate, up

Both hold for a tensor-parallel rank's rows too: it has whole query groups, and its own half of gate and of up.
"""

from typing import Literal, NamedTuple

import torch

Fusion = Literal["none", "qkv", "gate_up"]
FUSIONS: tuple[Fusion, ...] = ("none", "qkv", "gate_up")


class AttentionShape(NamedTuple):
    """What is needed to tell queries from keys and values."""

    queries_per_group: int
    head_size: int


def fusion_of(name: str, gated: bool) -> Fusion:
    """How the weight called `name` is fused; `gated`: MLPs have a gate."""
    if name.endswith("linear_qkv.weight"):
        return "qkv"
    return "gate_up" if gated and name.endswith("linear_fc1.weight") else "none"


def split(matrix: torch.Tensor, fusion: Fusion, attention: AttentionShape) -> list[torch.Tensor]:
    """The matrices that `matrix` [rows, columns] is made of."""
    if fusion == "qkv":
        queries, size = attention
        groups = matrix.view(-1, queries + 2, size, matrix.size(1))
        parts = groups[:, :queries], groups[:, queries], groups[:, queries + 1]
        return [part.reshape(-1, matrix.size(1)) for part in parts]
    return list(matrix.chunk(2)) if fusion == "gate_up" else [matrix]


def join(parts: list[torch.Tensor], fusion: Fusion, attention: AttentionShape) -> torch.Tensor:
    """The inverse of `split`."""
    if fusion == "qkv":
        queries, size = attention
        query, key, value = parts
        columns = query.size(1)
        groups = [query.view(-1, queries, size, columns), *(x.view(-1, 1, size, columns) for x in (key, value))]
        return torch.cat(groups, dim=1).view(-1, columns)
    return torch.cat(parts) if fusion == "gate_up" else parts[0]
