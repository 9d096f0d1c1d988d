"""GeGLU and bias with GELU, forward and backward. Peers: torch.compile and Liger (GeGLU's tanh form)."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from kernel_cases.case import Call, Case, Forms, backward_of, compiled
from parallel.kernels import bias_gelu, geglu
from parallel.kernels.bias_gelu import Approximate

# (tokens of a micro-batch, width of the MLP): quickstart's, a 125M model's at 2,048 tokens, and a 1B model's at 4,096.
GATED = ((8 * 256, 704), (2048, 2048), (4096, 5632))
# The same without gates, whose MLPs are wider; the last is as wide as GPT-3's of 1.3 B.
BIASED = ((8 * 256, 1024), (2048, 3072), (4096, 8192))
FORMS: tuple[Approximate, ...] = ("none", "tanh")


def cases() -> Iterator[Case]:
    for approximate in FORMS:
        for dtype in geglu.DTYPES:
            for part, numbers, biased, target in (("forward", 3, 2, 0.95), ("backward", 5, 3, 0.92)):
                for tokens, width in GATED:
                    yield Case(
                        kernel=geglu.KERNEL,
                        part=part,
                        shape=_shape(tokens, width, approximate),
                        dtype=dtype,
                        bytes_moved=numbers * tokens * width * dtype.itemsize,
                        target=target,
                        build=partial(_geglu, part, tokens, width, approximate, dtype),
                    )
                for tokens, width in BIASED:
                    yield Case(
                        kernel=bias_gelu.KERNEL,
                        part=part,
                        shape=_shape(tokens, width, approximate),
                        dtype=dtype,
                        bytes_moved=biased * tokens * width * dtype.itemsize,
                        target=target,
                        build=partial(_bias_gelu, part, tokens, width, approximate, dtype),
                    )


def _shape(tokens: int, width: int, approximate: Approximate) -> str:
    return f"{tokens} tokens x {width}{', tanh' if approximate == 'tanh' else ''}"


def _forms(
    part: str,
    inputs: tuple[torch.Tensor, ...],
    grad: torch.Tensor,
    reference: Callable[..., torch.Tensor],
    fused: Callable[..., torch.Tensor],
    peers: dict[str, Callable[[], Callable[..., torch.Tensor]]],
) -> Forms:
    def call(form: Callable[..., torch.Tensor]) -> Call:
        return partial(form, *inputs) if part == "forward" else backward_of(form, inputs, grad)

    all_peers = {"torch.compile": lambda: compiled(reference), **peers}
    return Forms(
        torch=call(reference),
        ours=call(fused),
        peers={name: partial(lambda make: call(make()), make) for name, make in all_peers.items()},
    )


def _geglu(
    part: str, tokens: int, width: int, approximate: Approximate, dtype: torch.dtype, device: torch.device
) -> Forms:
    gate_up = torch.randn(tokens, 2 * width, device=device, dtype=dtype)
    grad = torch.randn(tokens, width, device=device, dtype=dtype)
    reference, fused = (partial(form, approximate=approximate) for form in (geglu.reference, geglu.fused))
    return _forms(part, (gate_up,), grad, reference, fused, {"Liger": _liger} if approximate == "tanh" else {})


def _bias_gelu(
    part: str, tokens: int, width: int, approximate: Approximate, dtype: torch.dtype, device: torch.device
) -> Forms:
    product = torch.randn(tokens, width, device=device, dtype=dtype)
    bias = torch.randn(width, device=device, dtype=dtype)
    grad = torch.randn(tokens, width, device=device, dtype=dtype)
    reference, fused = (partial(form, approximate=approximate) for form in (bias_gelu.reference, bias_gelu.fused))
    return _forms(part, (product, bias), grad, reference, fused, {})


def _liger() -> Callable[[torch.Tensor], torch.Tensor]:
    from liger_kernel.ops.geglu import LigerGELUMulFunction

    return lambda gate_up: LigerGELUMulFunction.apply(*gate_up.chunk(2, dim=-1))
