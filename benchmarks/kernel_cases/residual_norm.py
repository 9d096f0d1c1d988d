"""Residual addition with RMSNorm and LayerNorm, forward and backward. Peers: torch.compile and Liger."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from kernel_cases.case import Call, Case, Forms, compiled
from parallel.kernels import residual_norm

# (tokens of a micro-batch, width of the model): a 40M model's, a 1B model's and a 7B model's.
SHAPES = ((2048, 512), (2048, 2048), (2048, 4096))
Form = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def cases() -> Iterator[Case]:
    for tokens, width in SHAPES:
        for dtype in residual_norm.DTYPES:
            for norm in ("RMSNorm", "LayerNorm"):
                for part, target in (("forward", 0.92), ("backward", 0.85)):
                    yield Case(
                        kernel=residual_norm.KERNEL,
                        part=part,
                        shape=f"{norm} {tokens} tokens x {width}",
                        dtype=dtype,
                        bytes_moved=4 * tokens * width * dtype.itemsize,
                        target=target,
                        build=partial(_forms, part, norm == "LayerNorm", tokens, width, dtype),
                    )


def _forms(part: str, layer_norm: bool, tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> Forms:
    x, residual, *grads = (torch.randn(tokens, width, device=device, dtype=dtype) for _ in range(4))
    weights = [torch.randn(width, device=device, dtype=dtype) for _ in range(1 + layer_norm)]

    def call(form: Form) -> Call:
        if part == "forward":
            return lambda: form(x, residual, *weights)
        leaves = [each.detach().clone().requires_grad_() for each in (x, residual, *weights)]
        results = form(*leaves)
        return lambda: torch.autograd.grad(results, leaves, grads, retain_graph=True)

    peers = {"torch.compile": lambda: call(compiled(residual_norm.reference))}  # type: ignore[arg-type,type-var]
    if not layer_norm:
        peers["Liger"] = lambda: call(_liger())
    return Forms(torch=call(residual_norm.reference), ours=call(_ours), peers=peers)


def _ours(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    normed = residual_norm.fused(*inputs)
    return normed.normalised, normed.stream


def _liger() -> Form:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return lambda x, residual, weight: LigerFusedAddRMSNormFunction.apply(
        x, residual, weight, 1e-5, 0.0, "llama", False
    )
