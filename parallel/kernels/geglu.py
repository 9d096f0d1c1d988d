"""GeGLU (arXiv 2002.05202): hidden = gelu(gate) · up, with the exact GELU or its tanh approximation (`bias_gelu.py`).

Both forms take `gate_up`, [..., 2·width] with the gate in the first half of the last dimension, as megatron-core's
fused fc1 lays it out, and give `hidden`, [..., width].

The fused form goes through memory once: it moves 3 numbers forward and 5 backward for each number of `hidden`, where
torch in eager mode moves 5 and 13. For the backward pass it keeps `gate_up` alone, where torch keeps gelu(gate) as
well. It computes in fp32 and rounds once.
"""

from typing import Any

import torch
import torch.nn.functional as F

from parallel.kernels import extension
from parallel.kernels.bias_gelu import Approximate
from parallel.kernels.choice import Kernel
from parallel.kernels.self_test import Trial

DTYPES = (torch.float32, torch.bfloat16)
"""What the fused form takes."""
FASTER_ON = frozenset({"cpu"})
"""Devices where `benchmarks/kernels.py` measured the fused form to be faster (benchmarks/results/kernels.json). CUDA is
missing because no GPU was at hand: there `auto` is torch until somebody has measured."""
KERNEL = Kernel("geglu", ("geglu_forward", "geglu_backward"), FASTER_ON)


def reference(gate_up: torch.Tensor, approximate: Approximate = "none") -> torch.Tensor:
    """GeGLU by torch's own operators; any floating dtype and strides. `gate_up` [..., 2·width] → [..., width]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate=approximate) * up


def fused(gate_up: torch.Tensor, approximate: Approximate = "none") -> torch.Tensor:
    """GeGLU in one pass. `gate_up` contiguous fp32 or bf16 [..., 2·width] → [..., width], same dtype.

    Differentiable once, under autograd and torch.compile. Raises TypeError for other dtypes, ValueError for other
    shapes and strides.
    """
    _check(gate_up)
    hidden: torch.Tensor = torch.ops.headrace.geglu_forward(gate_up, approximate == "tanh")
    return hidden


TRIAL = Trial(KERNEL, lambda: (torch.randn(512, 2 * 704, dtype=torch.float64),), fused, reference)


def _check(gate_up: torch.Tensor) -> None:
    if gate_up.dtype not in DTYPES:
        raise TypeError(f"fused geglu: gate_up is {gate_up.dtype}; it takes torch.float32 and torch.bfloat16")
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        shape = list(gate_up.shape)
        raise ValueError(f"fused geglu: gate_up has shape {shape}; the last dimension is gate and up, so even")
    if not gate_up.is_contiguous():
        raise ValueError(
            f"fused geglu: gate_up of shape {list(gate_up.shape)} has strides {list(gate_up.stride())}; "
            "call .contiguous() on it"
        )


def _forward_shape(gate_up: torch.Tensor, tanh: bool) -> torch.Tensor:
    _check(gate_up)
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def _backward_shape(grad: torch.Tensor, gate_up: torch.Tensor, tanh: bool) -> torch.Tensor:
    _check(gate_up)
    return torch.empty_like(gate_up)


def _save(ctx: Any, inputs: tuple[torch.Tensor, bool], output: torch.Tensor) -> None:
    gate_up, ctx.tanh = inputs
    ctx.save_for_backward(gate_up)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
    (gate_up,) = ctx.saved_tensors
    # sum().backward() and the like send expanded gradients
    return torch.ops.headrace.geglu_backward(grad.contiguous(), gate_up, ctx.tanh), None


def _no_second_derivative(ctx: Any, grad: torch.Tensor) -> None:
    raise NotImplementedError("fused geglu has no second derivative; use geglu.reference for it")


def _register() -> None:
    """Tell torch the operators' shapes and gradients; their code is in the library already."""
    torch.library.register_fake("headrace::geglu_forward", _forward_shape)
    torch.library.register_fake("headrace::geglu_backward", _backward_shape)
    torch.library.register_autograd("headrace::geglu_forward", _backward, setup_context=_save)
    torch.library.register_autograd("headrace::geglu_backward", _no_second_derivative)


if extension.has(*KERNEL.operators):
    _register()
