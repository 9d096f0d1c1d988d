"""SwiGLU, forward and backward. Peers: torch.compile and Liger."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from kernel_cases.case import Call, Case, Forms, backward_of, compiled
from parallel.kernels import swiglu

# (tokens of a micro-batch, width of the MLP): quickstart's, a 125M model's at 2,048 tokens, and a 1B model's at 4,096.
SHAPES = ((8 * 256, 704), (2048, 2048), (4096, 5632))


def cases() -> Iterator[Case]:
    for tokens, width in SHAPES:
        for dtype in swiglu.DTYPES:
            for part, numbers, target in (("forward", 3, 0.95), ("backward", 5, 0.92)):
                yield Case(
                    kernel=swiglu.KERNEL,
                    part=part,
                    shape=f"{tokens} tokens x {width}",
                    dtype=dtype,
                    bytes_moved=numbers * tokens * width * dtype.itemsize,
                    target=target,
                    build=partial(_forms, part, tokens, width, dtype),
                )


def _forms(part: str, tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> Forms:
    gate_up = torch.randn(tokens, 2 * width, device=device, dtype=dtype)
    grad = torch.randn(tokens, width, device=device, dtype=dtype)

    def call(form: Callable[[torch.Tensor], torch.Tensor]) -> Call:
        return partial(form, gate_up) if part == "forward" else backward_of(form, (gate_up,), grad)

    return Forms(
        torch=call(swiglu.reference),
        ours=call(swiglu.fused),
        peers={"torch.compile": lambda: call(compiled(swiglu.reference)), "Liger": lambda: call(_liger())},
    )


def _liger() -> Callable[[torch.Tensor], torch.Tensor]:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return lambda gate_up: LigerSiLUMulFunction.apply(*gate_up.chunk(2, dim=-1))
