"""Bias and GELU (arXiv 1606.08415) in one: hidden = gelu(input + bias), the activation of an MLP with biases.

    exact   gelu(z) = z·Φ(z), Φ the normal distribution's                    (`approximate="none"`)
    tanh    gelu(z) = z·(1 + tanh(√(2/π)·(z + 0.044715·z³))) / 2             (`approximate="tanh"`)

`input` is [..., width], fc1's product without its bias; `bias` [width]; both of one dtype. `hidden` is like `input`.

The fused form goes through memory once: it moves 2 numbers forward and 3 backward for each of `hidden`, where torch in
eager mode moves 4 and 4 (it writes input + bias, and reads the gradient once more to sum it for the bias). It computes
in fp32, input + bias included, and rounds once. For the backward pass it keeps `input`, where torch keeps input + bias.
The bias's gradient is summed in a fixed order, the same bit for bit whatever the number of threads.
"""

from typing import Any, Literal

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
KERNEL = Kernel("bias_gelu", ("bias_gelu_forward", "bias_gelu_backward"), FASTER_ON)
Approximate = Literal["none", "tanh"]


def reference(input: torch.Tensor, bias: torch.Tensor, approximate: Approximate = "none") -> torch.Tensor:
    """By torch's own operators; any floating dtype and strides."""
    return F.gelu(input + bias, approximate=approximate)


def fused(input: torch.Tensor, bias: torch.Tensor, approximate: Approximate = "none") -> torch.Tensor:
    """In one pass. `input` [..., width] and `bias` [width], contiguous, both fp32 or both bf16 → like `input`.

    Differentiable once, under autograd and torch.compile. Raises TypeError for other dtypes, ValueError for other
    shapes and strides.
    """
    _check(input, bias)
    hidden: torch.Tensor = torch.ops.headrace.bias_gelu_forward(input, bias, approximate == "tanh")
    return hidden


def _trial_inputs() -> tuple[torch.Tensor, ...]:
    return torch.randn(512, 704, dtype=torch.float64), torch.randn(704, dtype=torch.float64)


TRIAL = Trial(KERNEL, _trial_inputs, fused, reference)


def _check(input: torch.Tensor, bias: torch.Tensor) -> None:
    if input.dtype not in DTYPES:
        raise TypeError(f"fused bias_gelu: input is {input.dtype}; it takes torch.float32 and torch.bfloat16")
    if bias.dtype != input.dtype:
        raise TypeError(f"fused bias_gelu: bias is {bias.dtype}, input {input.dtype}; they must be of one dtype")
    if input.dim() == 0 or bias.shape != input.shape[-1:]:
        shapes = f"input has shape {list(input.shape)}, bias {list(bias.shape)}"
        raise ValueError(f"fused bias_gelu: {shapes}; bias must be as long as input's last dimension")
    if bias.device != input.device:
        raise ValueError(f"fused bias_gelu: bias is on {bias.device}, input on {input.device}; move one of them")
    for name, tensor in (("input", input), ("bias", bias)):
        if not tensor.is_contiguous():
            raise ValueError(
                f"fused bias_gelu: {name} of shape {list(tensor.shape)} has strides {list(tensor.stride())}; "
                "call .contiguous() on it"
            )


def _forward_shape(input: torch.Tensor, bias: torch.Tensor, tanh: bool) -> torch.Tensor:
    _check(input, bias)
    return torch.empty_like(input)


def _backward_shape(
    grad: torch.Tensor, input: torch.Tensor, bias: torch.Tensor, tanh: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(input, bias)
    return torch.empty_like(input), torch.empty_like(bias)


def _save(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor, bool], output: torch.Tensor) -> None:
    input, bias, ctx.tanh = inputs
    ctx.save_for_backward(input, bias)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    # sum().backward() and the like send expanded gradients
    grads = torch.ops.headrace.bias_gelu_backward(grad.contiguous(), *ctx.saved_tensors, ctx.tanh)
    return grads[0], grads[1], None


def _no_second_derivative(ctx: Any, *grads: torch.Tensor) -> None:
    raise NotImplementedError("fused bias_gelu has no second derivative; use bias_gelu.reference for it")


def _register() -> None:
    """Tell torch the operators' shapes and gradients; their code is in the library already."""
    torch.library.register_fake("headrace::bias_gelu_forward", _forward_shape)
    torch.library.register_fake("headrace::bias_gelu_backward", _backward_shape)
    torch.library.register_autograd("headrace::bias_gelu_forward", _backward, setup_context=_save)
    torch.library.register_autograd("headrace::bias_gelu_backward", _no_second_derivative)


if extension.has(*KERNEL.operators):
    _register()
