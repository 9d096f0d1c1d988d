"""Rotary position embedding (RoPE, arXiv 2104.09864) for packed tokens.

megatron-core slices and concatenates cosines anew in every layer, once for each document; and when a micro-batch is
exactly as long as the table it takes positions from the start of the micro-batch instead of the document. Here the
cosines of a micro-batch are looked up once, by `position_ids`, and every layer uses the same two tensors.
"""

import functools
from typing import Any

import torch

from parallel.rope_scaling import RopeScaling, attention_factor, scaled_frequencies


@functools.lru_cache(maxsize=8)
def rotary_table(
    length: int,
    head_size: int,
    base: float,
    dtype: torch.dtype,
    device: torch.device,
    scaling: RopeScaling | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of positions 0..length-1, each `dtype[length, head_size / 2]`; angles are computed in fp32.

    With `scaling` of other frequencies, and under YaRN larger than 1.
    """
    if scaling is None:
        frequencies = base ** -(torch.arange(0, head_size, 2, dtype=torch.float32, device=device) / head_size)
    else:
        frequencies = scaled_frequencies(base, head_size, scaling, device)
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies)
    size = 1.0 if scaling is None else attention_factor(scaling)
    return (angles.cos() * size).to(dtype), (angles.sin() * size).to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`x[tokens, heads, head_size]` rotated; `cos`, `sin` are `[tokens, 1, head_size / 2]`.

    Dimension i is paired with i + head_size / 2, the convention of GPT-NeoX and of the Hugging Face Llama.
    """
    rotated: torch.Tensor = _Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return rotated


class _Rotate(torch.autograd.Function):
    """The backward of a rotation is the rotation back: nothing but the cosines is kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, -1.0), None, None


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float) -> torch.Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    (a, b), (out_a, out_b) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin, value=sign)
    return out
