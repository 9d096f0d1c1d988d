"""A residual addition and the norm behind it: RMSNorm (arXiv 1910.07467) or LayerNorm (arXiv 1607.06450).

    stream     = x + residual                  in the activations' dtype; without a residual it is x itself
    normalised = stream / rms(stream) · weight                                  RMSNorm, `bias` is None
    normalised = (stream - mean) / standard deviation · weight + bias           LayerNorm

x, residual, stream and normalised are [..., width]; weight and bias [width]. Variance and mean square have `eps` added.

The fused form goes through memory once: it moves 4 numbers forward and 4 backward for each number of x (2 and 3 without
a residual), where torch in eager mode moves 5 and 6 with its fastest norms and far more on a CPU, where its RMSNorm is
several operators. Two gradients arrive in the backward pass, that of `normalised` and that of `stream`, and are added
in the same pass. It computes in fp32 and rounds once; the weights' gradients are sums over rows in a fixed order, so a
run gives the same bits again. For the backward pass it keeps stream, weight and one number (LayerNorm: two) for each
row. Mathematics and layout: `csrc/residual_norm.h`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from parallel.kernels import extension
from parallel.kernels.choice import Kernel
from parallel.kernels.self_test import Trial

DTYPES = (torch.float32, torch.bfloat16)
"""What the fused form takes, for activations and for weights, in every combination."""
FASTER_ON = frozenset({"cpu"})
"""Devices where `benchmarks/kernels.py` measured the fused form to be faster (benchmarks/results/kernels.json). CUDA is
missing because no GPU was at hand."""
KERNEL = Kernel(
    "residual_norm",
    (
        "rms_norm_forward",
        "residual_rms_norm_forward",
        "rms_norm_backward",
        "layer_norm_forward",
        "residual_layer_norm_forward",
        "layer_norm_backward",
    ),
    FASTER_ON,
)


class Normed(NamedTuple):
    """What `fused` gives."""

    normalised: torch.Tensor
    stream: torch.Tensor
    """x + residual; x itself without a residual."""
    square_sum: torch.Tensor
    """float32[rows], not differentiable: each row's sum of stream², from which a block's output has its RMS."""


def reference(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normalised, stream) by torch's own operators; any floating dtype and strides. LayerNorm when `bias` is given."""
    stream = x if residual is None else residual + x
    if bias is None:
        return F.rms_norm(stream, weight.shape, weight, eps), stream
    return F.layer_norm(stream, weight.shape, weight, bias, eps), stream


def fused(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> Normed:
    """Addition and norm in one pass; LayerNorm when `bias` is given.

    `x` and `residual` contiguous fp32 or bf16 [..., width], alike; `weight` and `bias` contiguous fp32 or bf16 [width],
    alike. Differentiable once, under autograd and torch.compile. Raises TypeError for other dtypes, ValueError for
    other shapes, strides and devices.
    """
    _check(x, residual, weight, bias)
    operators = torch.ops.headrace
    if residual is None:
        if bias is None:
            normalised, _, square_sum = operators.rms_norm_forward(x, weight, eps)
        else:
            normalised, _, _, square_sum = operators.layer_norm_forward(x, weight, bias, eps)
        return Normed(normalised, x, square_sum)
    if bias is None:
        normalised, stream, _, square_sum = operators.residual_rms_norm_forward(x, residual, weight, eps)
    else:
        normalised, stream, _, _, square_sum = operators.residual_layer_norm_forward(x, residual, weight, bias, eps)
    return Normed(normalised, stream, square_sum)


def _tried_inputs() -> tuple[torch.Tensor, ...]:
    x, residual = torch.randn(512, 1000, dtype=torch.float64), torch.randn(512, 1000, dtype=torch.float64)
    return x + 1, residual, torch.rand(1000, dtype=torch.float64) + 0.5, torch.randn(1000, dtype=torch.float64)


def _try(
    form: Callable[..., tuple[torch.Tensor, ...]],
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """All four operators."""
    rms, stream, *_ = form(x, residual, weight)
    layer, *_ = form(x, residual, weight, bias)
    return rms, stream, layer, form(x, None, weight)[0], form(x, None, weight, bias)[0]


TRIAL = Trial(KERNEL, inputs=_tried_inputs, fused=partial(_try, fused), reference=partial(_try, reference))


def _check(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    named = {"x": x, "residual": residual, "weight": weight, "bias": bias}
    for name, tensor in named.items():
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            raise TypeError(f"fused residual norm: {name} is {tensor.dtype}; it takes torch.float32 and torch.bfloat16")
        if not tensor.is_contiguous():
            raise ValueError(
                f"fused residual norm: {name} of shape {list(tensor.shape)} has strides {list(tensor.stride())}; "
                "call .contiguous() on it"
            )
        if tensor.device != x.device:
            raise ValueError(f"fused residual norm: {name} is on {tensor.device}, x on {x.device}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"fused residual norm: x has shape {list(x.shape)}; its last dimension is what is normalised")
    if residual is not None:
        _check_alike("residual", residual, "x", x, x.shape)
    _check_alike("weight", weight, "weight", weight, x.shape[-1:])
    if bias is not None:
        _check_alike("bias", bias, "weight", weight, x.shape[-1:])


def _check_alike(name: str, tensor: torch.Tensor, other: str, like: torch.Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        raise ValueError(f"fused residual norm: {name} has shape {list(tensor.shape)}; beside x it is {list(shape)}")
    if tensor.dtype != like.dtype:
        raise TypeError(f"fused residual norm: {name} is {tensor.dtype}, {other} is {like.dtype}")


def _row_numbers(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


def _rms_forward_shapes(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, ...]:
    return torch.empty_like(x), _row_numbers(x), _row_numbers(x)


def _residual_rms_forward_shapes(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, ...]:
    return torch.empty_like(x), torch.empty_like(x), _row_numbers(x), _row_numbers(x)


def _layer_forward_shapes(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, ...]:
    return torch.empty_like(x), _row_numbers(x), _row_numbers(x), _row_numbers(x)


def _residual_layer_forward_shapes(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, ...]:
    return torch.empty_like(x), torch.empty_like(x), _row_numbers(x), _row_numbers(x), _row_numbers(x)


def _rms_backward_shapes(
    grad_normalised: torch.Tensor,
    grad_stream: torch.Tensor | None,
    stream: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    return torch.empty_like(stream), torch.empty_like(weight)


def _layer_backward_shapes(
    grad_normalised: torch.Tensor,
    grad_stream: torch.Tensor | None,
    stream: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    return torch.empty_like(stream), torch.empty_like(weight), torch.empty_like(weight)


class _Gradients:
    """Autograd of one of the four forward operators: `residual` and `layer_norm` say which."""

    def __init__(self, residual: bool, layer_norm: bool) -> None:
        self._residual, self._layer_norm = residual, layer_norm

    def save(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        """Keep stream, weight and the statistics that the backward pass reads."""
        stream = output[1] if self._residual else inputs[0]
        statistics = output[2 if self._residual else 1 :]
        ctx.save_for_backward(stream, inputs[1 + self._residual], *statistics[:-1])
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)

    def backward(self, ctx: Any, grad_normalised: torch.Tensor | None, *others: torch.Tensor | None) -> Any:
        """Gradients of x, [residual,] weight, [bias,] eps."""
        stream, weight, *statistics = ctx.saved_tensors
        grad_stream = others[0] if self._residual else None
        weights: list[torch.Tensor | None]
        if grad_normalised is None:  # nobody used it
            grad, weights = grad_stream, [None] * (1 + self._layer_norm)
        else:
            operators = torch.ops.headrace
            backward = operators.layer_norm_backward if self._layer_norm else operators.rms_norm_backward
            # sum().backward() and the like send expanded gradients
            contiguous = None if grad_stream is None else grad_stream.contiguous()
            grad, *weights = backward(grad_normalised.contiguous(), contiguous, stream, weight, *statistics)
        return (*([grad] * (1 + self._residual)), *weights, None)


def _no_second_derivative(ctx: Any, *grads: torch.Tensor) -> None:
    raise NotImplementedError("fused residual norm has no second derivative; use residual_norm.reference for it")


def _register() -> None:
    """Tell torch the operators' shapes and gradients; their code is in the library already."""
    forwards: dict[str, tuple[Callable[..., Any], _Gradients]] = {
        "rms_norm_forward": (_rms_forward_shapes, _Gradients(residual=False, layer_norm=False)),
        "residual_rms_norm_forward": (_residual_rms_forward_shapes, _Gradients(residual=True, layer_norm=False)),
        "layer_norm_forward": (_layer_forward_shapes, _Gradients(residual=False, layer_norm=True)),
        "residual_layer_norm_forward": (_residual_layer_forward_shapes, _Gradients(residual=True, layer_norm=True)),
    }
    for name, (shapes, gradients) in forwards.items():
        torch.library.register_fake(f"headrace::{name}", shapes)
        torch.library.register_autograd(f"headrace::{name}", gradients.backward, setup_context=gradients.save)
    backwards: dict[str, Callable[..., Any]] = {
        "rms_norm_backward": _rms_backward_shapes,
        "layer_norm_backward": _layer_backward_shapes,
    }
    for name, shapes in backwards.items():
        torch.library.register_fake(f"headrace::{name}", shapes)
        torch.library.register_autograd(f"headrace::{name}", _no_second_derivative)


if extension.has(*KERNEL.operators):
    _register()
