"""AdamW (arXiv 1711.05101) over many tensors at once: clipping, update, 16-bit weights and sums in one pass.

    group = Group(tensors=2, lr=3e-4, weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8, step=1)
    fused(weights, gradients, exp_avgs, exp_avg_sqs, [group], grad_norm=norm, max_norm=1.0)

updates two tensors in place by their gradients, scaled down so that the norm of all, `norm` (float64[1] on the device),
is at most 1; an infinite norm or NaN leaves everything as it is. The host reads nothing and waits for nothing.

What a weight is decides the form; bytes moved for each with fp32 gradients (2 fewer with bf16 ones):

    weights    lows              form                                                                     bytes
    fp32       none              a weight                                                                    28
    fp32       bf16 copies       a master weight, and the model's, which is it rounded to nearest            30
    bf16       int16 remainders  the model's weight, and the lower half of its fp32 master                   28
    bf16       none              the model's weight, rounded up or down at random, right on average          24

Moments are fp32. The first three have the same masters bit for bit (in the third a weight is its master rounded to
nearest with ties away from zero). Random numbers of the last are squares32 (arXiv 2004.06278) of the seed, the step and
the number's place in the whole model (`bases`): the same for every way to shard the model.

torch does the same in a pass for the norm's scale (8 bytes), one for the update (28) and one for the copies (6), and
moves 32 more for `sums`. On CPUs with AVX2 masters and moments are the bits of torch's fused AdamW after clipping, but
for the last few numbers of a tensor, where torch rounds differently.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from parallel.kernels import extension
from parallel.kernels.choice import Kernel
from parallel.kernels.self_test import Trial

FASTER_ON = frozenset({"cpu"})
"""Devices where `benchmarks/kernels.py` measured the fused form to be faster. CUDA is missing because no GPU was at
hand."""
KERNEL = Kernel("adamw", ("adamw_",), FASTER_ON)
CLIP_EPS = 1e-6
"""Added to the norm that gradients are divided by, as torch and megatron-core do."""

Tensors = Sequence[torch.Tensor]


class Group(NamedTuple):
    """Settings of the next `tensors` tensors."""

    tensors: int
    lr: float
    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    step: int
    """Number of this update, counted from 1."""


def reference(
    weights: Tensors,
    gradients: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    groups: Sequence[Group],
    *,
    lows: Tensors = (),
    bases: Sequence[int] = (),
    grad_norm: torch.Tensor | None = None,
    max_norm: float = 0.0,
    seed: int = 0,
    sums: bool = False,
) -> torch.Tensor:
    """What `fused` does, by torch's own operators; weights and moments may be float64, strides any."""
    found = torch.zeros(len(weights) if sums else 0, 3, dtype=torch.float64, device=weights[0].device)
    norm = 0.0 if grad_norm is None else float(grad_norm)
    if not math.isfinite(norm):
        return found
    scale = min(1.0, max_norm / (norm + CLIP_EPS)) if max_norm > 0.0 else 1.0
    settings = [group for group in groups for _ in range(group.tensors)]
    for number, (weight, group) in enumerate(zip(weights, settings, strict=True)):
        low = lows[number] if lows else None
        exp_avg, exp_avg_sq = exp_avgs[number], exp_avg_sqs[number]
        before = _master(weight, low)
        gradient = gradients[number].to(exp_avg.dtype) * scale
        exp_avg.lerp_(gradient, 1.0 - group.beta1)
        exp_avg_sq.mul_(group.beta2).add_((1.0 - group.beta2) * gradient * gradient)
        root = exp_avg_sq.sqrt() / math.sqrt(1.0 - group.beta2**group.step) + group.eps
        step_size = group.lr / (1.0 - group.beta1**group.step)
        after = before * (1.0 - group.lr * group.weight_decay) - step_size * exp_avg / root
        base = bases[number] if bases else 0
        _put(after, weight, low, base, _key(seed, group.step))
        if sums:
            change = _master(weight, low).double() - before.double()
            each = (gradients[number].double(), change, before.double())
            found[number] = torch.stack([tensor.square().sum() for tensor in each])
    return found


def fused(
    weights: Tensors,
    gradients: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    groups: Sequence[Group],
    *,
    lows: Tensors = (),
    bases: Sequence[int] = (),
    grad_norm: torch.Tensor | None = None,
    max_norm: float = 0.0,
    seed: int = 0,
    sums: bool = False,
) -> torch.Tensor:
    """Update weights, moments and lows in place, in one launch (with `sums` two, the second a short one).

    All lists have a tensor of as many numbers for each weight, contiguous and on one device: weights all fp32 or all
    bf16, lows as the module says, gradients all fp32 or all bf16, moments fp32. `groups` settle the tensors in order.
    `bases` are the places of the tensors' first numbers in the whole model; only stochastic rounding asks for them.
    `max_norm`: see above; 0 leaves gradients as they are.

    Returns float64[tensors, 3] if `sums` (else float64[0, 3]): of each tensor's gradient before it was scaled, of the
    change of its weights, and of its weights before, the sums of squares; zeros where the norm was not finite. The sums
    have one order, so one result. Raises TypeError for other dtypes, ValueError for other sizes, strides, devices.
    """
    settings = torch.tensor([group[1:] for group in groups], dtype=torch.float64).reshape(-1, len(Group._fields) - 1)
    lists = [list(tensors) for tensors in (weights, lows, gradients, exp_avgs, exp_avg_sqs)]
    sizes = [group.tensors for group in groups]
    try:
        result: torch.Tensor = torch.ops.headrace.adamw_(
            *lists, settings, sizes, list(bases), grad_norm, max_norm, seed, sums
        )
    except RuntimeError:
        # The operator checks all of it, before it changes anything. Doing it here first takes 1 ms for 400 tensors.
        _check(weights, gradients, exp_avgs, exp_avg_sqs, lows, sizes, bases, grad_norm)
        raise
    return result


def _trial(form: Callable[..., torch.Tensor]) -> Callable[..., tuple[torch.Tensor, ...]]:
    """One update of masters by gradients of the inputs' dtype; `root` is the root of exp_avg_sq."""

    def run(
        weight: torch.Tensor, gradient: torch.Tensor, exp_avg: torch.Tensor, root: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        wide = torch.promote_types(weight.dtype, torch.float32)
        tensors = [each.detach().to(wide, copy=True) for each in (weight, exp_avg, root)]
        tensors[2].square_()
        norm = torch.full((1,), 2.0, dtype=torch.float64, device=weight.device)
        group = Group(1, lr=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8, step=2)
        lists = [[each] for each in (tensors[0], gradient.detach(), *tensors[1:])]
        return *tensors, form(*lists, [group], grad_norm=norm, max_norm=1.0, sums=True)[:, ::2]

    return run


TRIAL = Trial(
    KERNEL,
    lambda: tuple(torch.randn(300_000, dtype=torch.float64) * scale for scale in (0.02, 1.0, 0.1, 1.0)),
    _trial(fused),
    _trial(reference),
)


def _check(
    weights: Tensors,
    gradients: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    lows: Tensors,
    sizes: Sequence[int],
    bases: Sequence[int],
    grad_norm: torch.Tensor | None,
) -> None:
    """Raise for what the operator does not take."""
    if not weights:
        raise ValueError("fused adamw: there is no weight")
    master = weights[0].dtype == torch.float32
    lists = {
        "weights": (weights, (torch.float32, torch.bfloat16)),
        "gradients": (gradients, (torch.float32, torch.bfloat16)),
        "exp_avgs": (exp_avgs, (torch.float32,)),
        "exp_avg_sqs": (exp_avg_sqs, (torch.float32,)),
    }
    if lows:
        lists["lows"] = (lows, (torch.bfloat16,) if master else (torch.int16,))
    for name, (tensors, dtypes) in lists.items():
        if len(tensors) != len(weights):
            raise ValueError(f"fused adamw: {name} has {len(tensors)} tensors, weights {len(weights)}")
        for number, (tensor, weight) in enumerate(zip(tensors, weights, strict=True)):
            if tensor.dtype not in dtypes or tensor.dtype != tensors[0].dtype:
                wanted = " or ".join(map(str, dtypes))
                raise TypeError(f"fused adamw: {name}[{number}] is {tensor.dtype}; it takes {wanted} for all of {name}")
            if tensor.numel() != weight.numel():
                raise ValueError(
                    f"fused adamw: {name}[{number}] has {tensor.numel()} numbers, its weight {weight.numel()}"
                )
            if not tensor.is_contiguous():
                raise ValueError(
                    f"fused adamw: {name}[{number}] has strides {list(tensor.stride())}; make it contiguous"
                )
            if tensor.device != weights[0].device:
                found = f"{name}[{number}] is on {tensor.device}, weights[0] on {weights[0].device}"
                raise ValueError(f"fused adamw: {found}")
    if sum(sizes) != len(weights):
        raise ValueError(f"fused adamw: groups are for {sum(sizes)} of {len(weights)} tensors")
    if bases and len(bases) != len(weights):
        raise ValueError(f"fused adamw: bases has {len(bases)} numbers, not {len(weights)}")
    if grad_norm is not None and (grad_norm.dtype, grad_norm.numel()) != (torch.float64, 1):
        found = f"{grad_norm.dtype} of {grad_norm.numel()} numbers"
        raise TypeError(f"fused adamw: grad_norm is {found}; it takes one torch.float64")


def _master(weight: torch.Tensor, low: torch.Tensor | None) -> torch.Tensor:
    """What a weight stands for: itself, or the fp32 number that it and its remainder are."""
    if weight.dtype != torch.bfloat16:
        return weight.clone()
    if low is None:
        return weight.float()
    rounded_up = (low.int() >> 15) & 1
    upper = weight.view(torch.int16).int() - rounded_up
    return ((upper << 16) | (low.int() & 0xFFFF)).view(torch.float32)


def _put(value: torch.Tensor, weight: torch.Tensor, low: torch.Tensor | None, base: int, key: int) -> None:
    """Store `value` as `weight` and `low` say."""
    if weight.dtype != torch.bfloat16:
        weight.copy_(value)
        if low is not None:
            low.copy_(value)
        return
    bits = value.float().view(torch.int32).long() & 0xFFFFFFFF
    if low is None:
        places = base + torch.arange(value.numel(), device=value.device).reshape(value.shape)
        upper = (bits + _random16(places, key)) >> 16
    else:
        upper = (bits >> 16) + ((bits >> 15) & 1)
        low.copy_(_signed(torch.where(value.isnan(), 0, bits) & 0xFFFF, 16))
    weight.copy_(_signed(torch.where(value.isnan(), 0x7FC0, upper) & 0xFFFF, 16).short().view(torch.bfloat16))


_ALL = (1 << 64) - 1


def _key(seed: int, step: int) -> int:
    """Of the random numbers of a step."""
    return _mixed(_mixed(seed & _ALL) + step & _ALL) | 1


def _mixed(number: int) -> int:
    """splitmix64 (S. Vigna), a bijection of 64 bits."""
    number = (number + 0x9E3779B97F4A7C15) & _ALL
    number = ((number ^ number >> 30) * 0xBF58476D1CE4E5B9) & _ALL
    number = ((number ^ number >> 27) * 0x94D049BB133111EB) & _ALL
    return number ^ number >> 31


def _random16(places: torch.Tensor, key: int) -> torch.Tensor:
    """squares32 of each place, its upper 16 bits. int64 arithmetic wraps, as that of uint64."""
    signed = key - (1 << 64) if key >> 63 else key
    y = places * signed
    z = y + signed
    x = y
    for add in (y, z, y):
        x = x * x + add
        x = (x << 32) | ((x >> 32) & 0xFFFFFFFF)
    return ((x * x + z) >> 48) & 0xFFFF


def _signed(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Two's complement of that many bits."""
    return torch.where(numbers >> (bits - 1) != 0, numbers - (1 << bits), numbers)


def _shape(
    weights: Tensors,
    lows: Tensors,
    gradients: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    settings: torch.Tensor,
    group_sizes: Sequence[int],
    bases: Sequence[int],
    grad_norm: torch.Tensor | None,
    max_norm: float,
    seed: int,
    sums: bool,
) -> torch.Tensor:
    _check(weights, gradients, exp_avgs, exp_avg_sqs, lows, group_sizes, bases, grad_norm)
    return weights[0].new_empty(len(weights) if sums else 0, 3, dtype=torch.float64)


if extension.has(*KERNEL.operators):
    torch.library.register_fake("headrace::adamw_", _shape)
