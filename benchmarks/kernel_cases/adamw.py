"""AdamW's step. torch's form is what the trainer did before: clip in place, `_fused_adamw_`, copy to bf16 weights.

`update` is the update alone, where no gradient needs clipping, beside torch's fused kernel alone; `step` one in which
they do; `measured` a step that records the sums of squares, too.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from kernel_cases.case import Case, Forms
from kernel_cases.weights import MODELS, shapes
from parallel.kernels import adamw

SETTINGS = {"lr": 1e-4, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
PARTS = ("update", "step", "measured")


def cases() -> Iterator[Case]:
    for model in MODELS:
        numbers = sum(torch.Size(shape).numel() for shape in shapes(model))
        for dtype in (torch.float32, torch.bfloat16):
            for part in PARTS:
                yield Case(
                    kernel=adamw.KERNEL,
                    part=part,
                    shape=f"{numbers / 1e6:.1f}M in {len(shapes(model))} tensors",
                    dtype=dtype,
                    bytes_moved=numbers * (28 if dtype == torch.float32 else 30),
                    target=0.9,
                    build=partial(_forms, part, model, dtype),
                )


def _forms(part: str, model: str, dtype: torch.dtype, device: torch.device) -> Forms:
    def made(scale: float) -> list[torch.Tensor]:
        return [torch.randn(shape, device=device) * scale for shape in shapes(model)]

    def state() -> tuple[list[torch.Tensor], ...]:
        weights = made(0.02)
        copies = [] if dtype == torch.float32 else [weight.bfloat16() for weight in weights]
        return weights, made(1e-3), [torch.zeros_like(weight) for weight in weights], made(0.0), copies

    return Forms(torch=_torchs(part, device, *state()), ours=_ours(part, device, *state()))


def _ours(
    part: str,
    device: torch.device,
    weights: list[torch.Tensor],
    gradients: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    copies: list[torch.Tensor],
) -> Callable[[], object]:
    group = adamw.Group(len(weights), *SETTINGS.values(), step=10)
    norm = torch.ones(1, dtype=torch.float64, device=device)
    return partial(
        adamw.fused,
        *(weights, gradients, exp_avgs, exp_avg_sqs, [group]),
        lows=copies,
        grad_norm=norm,
        max_norm=2.0 if part == "update" else 0.99999,
        sums=part == "measured",
    )


def _torchs(
    part: str,
    device: torch.device,
    weights: list[torch.Tensor],
    gradients: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    copies: list[torch.Tensor],
) -> Callable[[], object]:
    steps = [torch.tensor(10.0, device=device) for _ in weights]

    def run() -> None:
        before = [weight.clone() for weight in weights] if part == "measured" else []
        if part == "measured":
            torch._foreach_norm(before)
            torch._foreach_norm(gradients)
        if part != "update":
            torch._foreach_mul_(gradients, 0.99999)
        torch._fused_adamw_(
            *(weights, gradients, exp_avgs, exp_avg_sqs, [], steps), **SETTINGS, amsgrad=False, maximize=False
        )
        if copies:
            torch._foreach_copy_(copies, weights)
        if part == "measured":
            torch._foreach_sub_(before, weights)
            torch._foreach_norm(before)

    return run
