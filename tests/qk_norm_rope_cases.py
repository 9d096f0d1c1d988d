"""Random queries, keys and values with all that goes with them, and how far from float64 a form may be."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from parallel.kernels.qk_norm_rope import HeadNorm, QueryKeyValue, reference
from parallel.rotary import rotary_table

NORMS = ("none", "RMSNorm", "LayerNorm")
MAX_POSITION = 50
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8}
"""Of what a result is made of: a handful of fp32 roundings, or one of bf16."""
Form = Callable[..., QueryKeyValue]


@dataclass(frozen=True)
class Case:
    """The inputs of a form, and gradients for its results."""

    qkv: torch.Tensor
    positions: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    norm: HeadNorm | None
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def random_case(
    shape: tuple[int, int, int, int],
    norm: str = "RMSNorm",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    positions: torch.dtype = torch.int64,
) -> Case:
    """`shape`: tokens, groups, queries per group, head size. Positions in any order; a bias on all numbers, so that
    means matter."""
    tokens, groups, queries, size = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    vectors = [(1 + 0.3 * draw(2, size)).to(dtype).unbind(), draw(2, size).to(dtype).unbind()]
    parameters = None
    if norm != "none":
        parameters = HeadNorm(*vectors[0], *(vectors[1] if norm == "LayerNorm" else (None, None)), eps=1e-5)
    return Case(
        qkv=(2 * draw(tokens, groups, queries + 2, size) + 0.3).to(dtype),
        positions=torch.randint(0, MAX_POSITION, (tokens,), generator=generator, dtype=positions),
        cos=(tables := rotary_table(MAX_POSITION, size, 100.0, dtype, torch.device("cpu")))[0],
        sin=tables[1],
        norm=parameters,
        grads=(
            draw(tokens, groups * queries, size).to(dtype),
            draw(tokens, groups, size).to(dtype),
            draw(tokens, groups, size).to(dtype),
        ),
    )


def in_float64(case: Case) -> Case:
    norm = case.norm and HeadNorm(*(None if x is None else x.double() for x in case.norm[:4]), eps=case.norm.eps)
    grads = case.grads[0].double(), case.grads[1].double(), case.grads[2].double()
    return replace(case, qkv=case.qkv.double(), cos=case.cos.double(), sin=case.sin.double(), norm=norm, grads=grads)


def results(form: Form, case: Case, with_lengths: bool = True) -> dict[str, torch.Tensor]:
    """What the form gives, and the gradients of its inputs, by name."""
    qkv = case.qkv.detach().clone().requires_grad_()
    vectors = {}
    if case.norm is not None:
        named = zip(HeadNorm._fields, case.norm[:4], strict=False)
        vectors = {name: x.detach().clone().requires_grad_() for name, x in named if x is not None}
    norm = case.norm and case.norm._replace(**vectors)
    found = form(qkv, case.positions, case.cos, case.sin, norm, with_lengths)
    leaves = {"qkv": qkv, **vectors}
    gradients = torch.autograd.grad(found[:3], list(leaves.values()), list(case.grads))
    named_results = {name: x.detach() for name, x in found._asdict().items() if x is not None}
    return named_results | {f"grad_{name}": x for name, x in zip(leaves, gradients, strict=True)}


def check_against_float64(mine: dict[str, torch.Tensor], case: Case) -> None:
    """AssertionError if one number of `mine` is too far from the reference in float64."""
    exact = in_float64(case)
    true = results(reference, exact)
    tolerance = TOLERANCE[case.qkv.dtype]
    assert mine.keys() == true.keys()
    for name, bound in _bounds(exact).items():
        if name in true:
            assert mine[name].shape == true[name].shape, name
            assert mine[name].dtype == (torch.float32 if name == "lengths" else case.qkv.dtype), name
            off = (mine[name].double() - true[name]).abs()
            limit = tolerance * (bound + true[name].abs()) + 1e-30
            assert bool((off <= limit).all()), f"{name}: off by {float((off / limit).max()) * tolerance:.2e}"


def _bounds(case: Case) -> dict[str, torch.Tensor]:
    """For each result the size of what it was summed from, broadcastable to it."""
    heads = case.qkv[:, :, :-1]  # [tokens, groups, queries + 1, size]
    largest = heads.abs().amax(-1, keepdim=True)
    scale, weight, bias = torch.ones_like(largest), torch.ones(()), torch.zeros(())
    if case.norm is not None:
        centred = heads if case.norm.query_bias is None else heads - heads.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + case.norm.eps).rsqrt()
        weight = torch.stack([case.norm.query_weight, case.norm.key_weight]).abs().amax()
        if case.norm.query_bias is not None and case.norm.key_bias is not None:
            bias = torch.stack([case.norm.query_bias, case.norm.key_bias]).abs().amax()
    normalised = largest * scale
    out = 2 * (normalised * weight + bias)
    tokens, groups, _, size = case.qkv.shape
    grad = torch.cat(
        [case.grads[0].unflatten(1, (groups, -1)) if tokens * groups else heads[:, :, :-1], case.grads[1].unsqueeze(2)],
        dim=2,
    )
    arriving = 2 * grad.abs().amax(-1, keepdim=True)
    value = torch.zeros_like(largest[:, :, :1])
    summed = (arriving * normalised).sum()
    return {
        "query": out[:, :, :-1].flatten(1, 2),
        "key": out[:, :, -1],
        "value": torch.zeros(()),
        "lengths": out.squeeze(-1) * size**0.5,
        "grad_qkv": torch.cat([arriving * scale * weight * (1 + normalised.square()), value], dim=2)
        if case.norm is not None
        else torch.cat([arriving, value], dim=2),
        **{f"grad_{name}": summed / max(1, tokens * groups) ** 0.5 for name in HeadNorm._fields[:4]},
    }
