"""Sums of squares of many gradients at once: of each tensor, and of all together, whose root is the gradient norm.

    sums, total, not_finite = fused([gradient of shape (4096, 1024), gradient of shape (4096,)])

`sums` float64[2], `total` float64[1], `not_finite` float32[1], 1 where the total is infinite or not a number and 0
elsewhere, as torch's loss scaler has it; all on the gradients' device, and the host waits for nothing.

The fused form reads each number once (4 bytes, or 2 of bf16), in two launches for any number of tensors. It gives the
same bits for the same tensors always: each sum has one order, with any number of threads. Squares are fp32 and sums of
up to 64 of them (CPU; 128 on a GPU), everything after that is float64.
"""

from collections.abc import Callable, Sequence

import torch

from parallel.kernels import extension
from parallel.kernels.choice import Kernel
from parallel.kernels.self_test import Trial

DTYPES = (torch.float32, torch.bfloat16)
"""What the fused form takes."""
FASTER_ON = frozenset({"cpu"})
"""Devices where `benchmarks/kernels.py` measured the fused form to be faster. CUDA is missing because no GPU was at
hand."""
KERNEL = Kernel("grad_norm", ("square_sums",), FASTER_ON)

Sums = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def reference(gradients: Sequence[torch.Tensor]) -> Sums:
    """By torch's own operators, all in float64; gradients of any floating dtype and strides, at least one."""
    sums = torch.stack([gradient.double().square().sum() for gradient in gradients])
    total = sums.sum().reshape(1)
    return sums, total, (~total.isfinite()).float()


def fused(gradients: Sequence[torch.Tensor]) -> Sums:
    """In one pass. `gradients`: at least one, contiguous, on one device, all fp32 or all bf16.

    Works under torch.compile. Raises TypeError for other dtypes, ValueError for other strides, devices or none.
    """
    try:
        sums: Sums = torch.ops.headrace.square_sums(list(gradients))
    except RuntimeError:
        _check(gradients)  # which says it better than the operator, but takes longer than many a launch
        raise
    return sums


def _trial(form: Callable[[Sequence[torch.Tensor]], Sums]) -> Callable[..., tuple[torch.Tensor, ...]]:
    return lambda *gradients: form([gradient.detach() for gradient in gradients])[:2]


TRIAL = Trial(
    KERNEL,
    lambda: tuple(torch.randn(size, dtype=torch.float64) for size in (300_000, 77)),
    _trial(fused),
    _trial(reference),
)


def _check(gradients: Sequence[torch.Tensor]) -> None:
    """Raise for what the operator does not take."""
    if not gradients:
        raise ValueError("fused grad_norm: there is no gradient")
    first = gradients[0]
    for number, gradient in enumerate(gradients):
        if gradient.dtype not in DTYPES or gradient.dtype != first.dtype:
            raise TypeError(
                f"fused grad_norm: gradients[{number}] is {gradient.dtype} and gradients[0] {first.dtype}; "
                "it takes torch.float32 or torch.bfloat16 for all"
            )
        if gradient.device != first.device:
            raise ValueError(f"fused grad_norm: gradients[{number}] is on {gradient.device}, others on {first.device}")
        if not gradient.is_contiguous():
            raise ValueError(
                f"fused grad_norm: gradients[{number}] of shape {list(gradient.shape)} has strides "
                f"{list(gradient.stride())}; call .contiguous() on it"
            )


def _shapes(gradients: Sequence[torch.Tensor]) -> Sums:
    _check(gradients)
    first = gradients[0]
    total = first.new_empty(1, dtype=torch.float64)
    return first.new_empty(len(gradients), dtype=torch.float64), total, first.new_empty(1, dtype=torch.float32)


if extension.has(*KERNEL.operators):
    torch.library.register_fake("headrace::square_sums", _shapes)
