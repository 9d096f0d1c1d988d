"""Embedding whose table's gradient is made from runs of equal tokens, without atomics and without touching other rows.

Both forms look up `tokens`, int64 of any shape, in `weight` [rows, width], and give [..., width]. With `first` the
table is a vocabulary-parallel rank's: it has rows of the tokens from `first` on, and tokens outside it get zeros.

    tokens    7 3 7 9        grad of the table     row 3 = g1
    sorted    3 7 7 9                              row 7 = g0 + g2
    order     1 0 2 3                              row 9 = g3, all other rows 0

The fused form sorts the tokens on their device (stable, so that the places of a token stay in order) and sums each run
in fp32 and a fixed order: deterministic everywhere, where torch's own on GPUs adds by atomics or, asked to be
deterministic, through `index_put`. Given `total`, float32 like `weight`, which has the sum of a step's gradients, it
adds to the rows that occur and makes no gradient at all: with T tokens of which U are different, bf16, it moves
2·T·width + 8·U·width bytes, where torch in eager mode moves 2·T·width + 12·rows·width (a zeroed table, and the whole
of it added to the sum). At 16,384 tokens, 151,936 rows, width 4,096 that is 0.3 GB instead of 7.6 GB.
"""

from typing import Any

import torch
import torch.nn.functional as F

from parallel.kernels import extension
from parallel.kernels.choice import Kernel
from parallel.kernels.self_test import Trial

DTYPES = (torch.float32, torch.bfloat16)
"""What the fused form takes."""
FASTER_ON = frozenset({"cpu"})
"""Devices where `benchmarks/kernels.py` measured the fused form to be faster (benchmarks/results/kernels.json). CUDA is
missing because no GPU was at hand: there `auto` is torch until somebody has measured."""
KERNEL = Kernel("embedding", ("embedding_gradient", "embedding_gradient_add_"), FASTER_ON)


def reference(tokens: torch.Tensor, weight: torch.Tensor, first: int | None = None) -> torch.Tensor:
    """By torch's own operators; any floating dtype. Raises IndexError for tokens outside a whole table."""
    if first is None:
        return F.embedding(tokens, weight)
    places, outside = _places(tokens, weight.size(0), first)
    return F.embedding(places.masked_fill(outside, 0), weight).masked_fill(outside[..., None], 0)


def fused(
    tokens: torch.Tensor, weight: torch.Tensor, first: int | None = None, total: torch.Tensor | None = None
) -> torch.Tensor:
    """`tokens` int64, `weight` fp32 or bf16 [rows, width] → [..., width].

    With `total`, contiguous float32[rows, width], a backward pass adds the table's gradient to it, and `weight` gets
    None for a gradient. Differentiable once, under autograd and torch.compile. Raises TypeError for other dtypes,
    ValueError for other shapes, IndexError for tokens outside a whole table.
    """
    _check(tokens, weight, total)
    out: torch.Tensor = _Embedding.apply(tokens, weight, first, total)  # type: ignore[no-untyped-call]
    return out


def _trial_inputs() -> tuple[torch.Tensor, ...]:
    return (torch.rand(2048) ** 3 * 8192).long(), torch.randn(8192, 256, dtype=torch.float64)


TRIAL = Trial(KERNEL, _trial_inputs, fused, reference)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: torch.Tensor, weight: torch.Tensor, first: int | None, total: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(tokens)
        ctx.rows, ctx.first, ctx.total = weight.size(0), first, total
        if first is None:
            return F.embedding(tokens, weight)
        places, outside = _places(tokens, ctx.rows, first)
        return F.embedding(places.masked_fill_(outside, 0), weight).masked_fill_(outside[..., None], 0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor | None, None, None]:
        (tokens,) = ctx.saved_tensors
        gradient = (
            table_gradient(grad, tokens, ctx.rows, ctx.first or 0, ctx.total) if ctx.needs_input_grad[1] else None
        )
        return None, gradient, None, None


def table_gradient(
    grad: torch.Tensor, tokens: torch.Tensor, rows: int, first: int = 0, total: torch.Tensor | None = None
) -> torch.Tensor | None:
    """Gradient [rows, width] of a table from `grad` [..., width] of what was looked up for `tokens`; with `total` it is
    added there, and the answer is None."""
    grad = grad.reshape(tokens.numel(), grad.size(-1)).contiguous()
    places = tokens.reshape(-1) - first if first else tokens.reshape(-1)
    ordered, order = places.sort(stable=True)
    if total is None:
        gradient: torch.Tensor = torch.ops.headrace.embedding_gradient(grad, ordered, order, rows)
        return gradient
    torch.ops.headrace.embedding_gradient_add_(total, grad, ordered, order)
    return None


def _places(tokens: torch.Tensor, rows: int, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(row of each token in this rank's table, whether it is in none)."""
    places = tokens - first
    return places, (places < 0) | (places >= rows)


def _check(tokens: torch.Tensor, weight: torch.Tensor, total: torch.Tensor | None) -> None:
    if tokens.dtype != torch.int64:
        raise TypeError(f"fused embedding: tokens are {tokens.dtype}; it takes torch.int64")
    if weight.dtype not in DTYPES:
        raise TypeError(f"fused embedding: weight is {weight.dtype}; it takes torch.float32 and torch.bfloat16")
    if weight.dim() != 2:
        raise ValueError(f"fused embedding: weight has shape {list(weight.shape)}; it must be [rows, width]")
    if weight.device != tokens.device:
        raise ValueError(f"fused embedding: weight is on {weight.device}, tokens on {tokens.device}; move one of them")
    if total is None:
        return
    if total.dtype != torch.float32:
        raise TypeError(f"fused embedding: total is {total.dtype}; it takes torch.float32")
    if total.shape != weight.shape or total.device != weight.device or not total.is_contiguous():
        shapes = f"total is {list(total.shape)} on {total.device}, weight {list(weight.shape)} on {weight.device}"
        raise ValueError(f"fused embedding: {shapes}; total must be contiguous and as weight is")


def _gradient_shape(grad: torch.Tensor, tokens: torch.Tensor, order: torch.Tensor, rows: int) -> torch.Tensor:
    return grad.new_empty((rows, grad.size(1)))


def _add_shape(table: torch.Tensor, grad: torch.Tensor, tokens: torch.Tensor, order: torch.Tensor) -> None:
    return None


def _register() -> None:
    """Tell torch the operators' shapes; their code is in the library already."""
    torch.library.register_fake("headrace::embedding_gradient", _gradient_shape)
    torch.library.register_fake("headrace::embedding_gradient_add_", _add_shape)


if extension.has(*KERNEL.operators):
    _register()
