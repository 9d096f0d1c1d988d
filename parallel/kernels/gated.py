"""What the gated activations `swiglu` and `geglu` share: their check of `gate_up`, shapes and gradients for torch.

`gate_up` is [..., 2·width] with the gate in the first half of the last dimension, as megatron-core's fused fc1 lays it
out. The operators `headrace::<op>_forward(gate_up, *settings)` → hidden [..., width] and
`headrace::<op>_backward(grad, gate_up, *settings)` → grad_gate_up go through memory once: 3 numbers move forward and
5 backward for each number of `hidden`, where torch in eager mode moves 5 and 13. For the backward pass `gate_up` alone
is kept, where torch keeps the activated gate as well. They compute in fp32 and round once.
"""

from typing import Any

import torch

DTYPES = (torch.float32, torch.bfloat16)
"""What the fused forms take."""


def check(op: str, gate_up: torch.Tensor) -> None:
    """Raises TypeError for another dtype, ValueError for an odd last dimension and for strides."""
    if gate_up.dtype not in DTYPES:
        raise TypeError(f"fused {op}: gate_up is {gate_up.dtype}; it takes torch.float32 and torch.bfloat16")
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        shape = list(gate_up.shape)
        raise ValueError(f"fused {op}: gate_up has shape {shape}; the last dimension is gate and up, so even")
    if not gate_up.is_contiguous():
        raise ValueError(
            f"fused {op}: gate_up of shape {list(gate_up.shape)} has strides {list(gate_up.stride())}; "
            "call .contiguous() on it"
        )


def register(op: str) -> None:
    """Tell torch the shapes and gradients of `op`'s operators, which are in the library; differentiable once."""
    forward, backward = f"headrace::{op}_forward", f"headrace::{op}_backward"
    run_backward = getattr(torch.ops.headrace, f"{op}_backward")

    def hidden_shape(gate_up: torch.Tensor, *settings: Any) -> torch.Tensor:
        check(op, gate_up)
        return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))

    def gradient_shape(grad: torch.Tensor, gate_up: torch.Tensor, *settings: Any) -> torch.Tensor:
        check(op, gate_up)
        return torch.empty_like(gate_up)

    def save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        gate_up, *ctx.settings = inputs
        ctx.save_for_backward(gate_up)

    def gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gate_up,) = ctx.saved_tensors
        # sum().backward() and the like send expanded gradients
        return run_backward(grad.contiguous(), gate_up, *ctx.settings), *(None for _ in ctx.settings)

    def no_second_derivative(ctx: Any, grad: torch.Tensor) -> None:
        raise NotImplementedError(f"fused {op} has no second derivative; use {op}.reference for it")

    torch.library.register_fake(forward, hidden_shape)
    torch.library.register_fake(backward, gradient_shape)
    torch.library.register_autograd(forward, gradient, setup_context=save)
    torch.library.register_autograd(backward, no_second_derivative)
