"""The norm of all gradients. torch's form is `_foreach_norm`; a peer is what megatron-core does without apex."""

from collections.abc import Iterator
from functools import partial

import torch

from kernel_cases.case import Call, Case, Forms
from kernel_cases.weights import MODELS, shapes
from parallel.kernels import grad_norm


def cases() -> Iterator[Case]:
    for model in MODELS:
        for dtype in grad_norm.DTYPES:
            numbers = sum(torch.Size(shape).numel() for shape in shapes(model))
            yield Case(
                kernel=grad_norm.KERNEL,
                part="step",
                shape=f"{numbers / 1e6:.1f}M in {len(shapes(model))} tensors",
                dtype=dtype,
                bytes_moved=numbers * dtype.itemsize,
                target=0.95,
                build=partial(_forms, model, dtype),
            )


def _forms(model: str, dtype: torch.dtype, device: torch.device) -> Forms:
    gradients = [torch.randn(shape, device=device).to(dtype) for shape in shapes(model)]

    def foreach() -> torch.Tensor:
        return torch.stack(torch._foreach_norm(gradients)).norm()

    def one_by_one() -> torch.Tensor:
        return torch.norm(torch.tensor([torch.norm(gradient) for gradient in gradients]))

    def megatron() -> Call:
        return one_by_one

    return Forms(torch=foreach, ours=lambda: grad_norm.fused(gradients)[1].sqrt(), peers={"megatron-core": megatron})
