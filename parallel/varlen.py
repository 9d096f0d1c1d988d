"""Attention of a whole packed row in one call of a GPU's kernel: flash-attn's, or torch's, which wraps an older one."""

import functools
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch

from parallel import accelerator


class Spans(NamedTuple):
    """Where pieces of a row lie, one after another."""

    starts: torch.Tensor
    """int32[pieces + 1], on the device: where each piece starts, and where the last one ends."""
    longest: int
    """Tokens of the longest piece."""


Varlen = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Spans, Spans, bool, float | None], torch.Tensor]
"""(query [queries, heads, head_size], key and value [keys, groups, head_size], where the pieces of each lie, causal,
scale) to query's shape. A query sees keys of its own piece: all, or, causal, with n queries query i all but the last
n-1-i."""


@functools.cache
def varlen_kernel(dtype: torch.dtype) -> Varlen | None:
    """The kernel for this device and dtype; flash-attn's first. None without a GPU, and in fp32."""
    if not accelerator.has_gpu() or dtype not in (torch.bfloat16, torch.float16):
        return None
    return flash_attn if importlib.util.find_spec("flash_attn") else torch_varlen


def flash_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    queries: Spans,
    keys: Spans,
    causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """A `Varlen`."""
    from flash_attn import flash_attn_varlen_func

    # Causal, with more keys than queries, is aligned to the last of each since flash-attn 2.1.
    out: torch.Tensor = flash_attn_varlen_func(
        query,
        key,
        value,
        queries.starts,
        keys.starts,
        queries.longest,
        keys.longest,
        softmax_scale=scale,
        causal=causal,
        deterministic=accelerator.is_deterministic(),  # torch's own kernel asks torch itself
    )
    return out


def torch_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    queries: Spans,
    keys: Spans,
    causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """A `Varlen`."""
    from torch.nn.attention.varlen import varlen_attn

    # torch's documentation of varlen_attn says nothing about more keys than queries. Its operator is flash-attn's of a
    # later version than 2.1, and torch itself calls that with is_causal where it means "aligned to the last"
    # (CausalVariant.LOWER_RIGHT in torch/nn/attention/bias.py); that is what we rely on.
    out: torch.Tensor = varlen_attn(
        query,
        key,
        value,
        queries.starts,
        keys.starts,
        queries.longest,
        keys.longest,
        scale=scale,
        window_size=(-1, 0) if causal else (-1, -1),
        enable_gqa=query.size(1) != key.size(1),
    )
    return out
