"""Norm and rotary embedding of queries and keys, forward and backward. Peers: torch.compile, Liger's norm and RoPE."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from kernel_cases.case import Call, Case, Forms, compiled
from parallel.kernels import qk_norm_rope
from parallel.kernels.qk_norm_rope import HeadNorm, QueryKeyValue
from parallel.rotary import rotary_table, rotate

# (tokens, query heads, key and value heads, head size, norm) of wonton, qwen3 1.7B and 8B, and llama 8B (no norm).
SHAPES = (
    (2048, 16, 16, 64, "LayerNorm"),
    (4096, 16, 8, 128, "RMSNorm"),
    (4096, 32, 8, 128, "RMSNorm"),
    (4096, 32, 8, 128, "none"),
)
Form = Callable[..., QueryKeyValue]
TARGETS = {"forward": 0.85, "backward": 0.80}


def cases() -> Iterator[Case]:
    for tokens, heads, groups, size, norm in SHAPES:
        # read and written: queries and keys; backward once more for what arrives, and the values' gradient
        numbers = {"forward": 2 * (heads + groups), "backward": 3 * (heads + groups) + 2 * groups}
        if norm == "none":
            numbers["backward"] -= heads + groups  # nothing but the gradient is needed
        for dtype in qk_norm_rope.DTYPES:
            for part in ("forward", "backward"):
                yield Case(
                    kernel=qk_norm_rope.KERNEL,
                    part=part,
                    shape=f"{tokens} tokens x {heads}+{groups} heads x {size}, {norm}",
                    dtype=dtype,
                    bytes_moved=numbers[part] * tokens * size * dtype.itemsize,
                    target=TARGETS[part],
                    build=partial(_forms, part, tokens, heads, groups, size, norm, dtype),
                )


def _forms(
    part: str,
    tokens: int,
    heads: int,
    groups: int,
    size: int,
    norm: str,
    dtype: torch.dtype,
    device: torch.device,
) -> Forms:
    qkv = torch.randn(tokens, groups, heads // groups + 2, size, device=device, dtype=dtype)
    positions = torch.randint(0, tokens, (tokens,), device=device)
    tables = rotary_table(tokens, size, 1e6, dtype, device)
    vectors = [torch.randn(size, device=device, dtype=dtype) for _ in range(4)] if norm != "none" else []
    if norm == "RMSNorm":
        vectors = vectors[:2]
    grads = [torch.randn(tokens, each, size, device=device, dtype=dtype) for each in (heads, groups, groups)]

    def call(form: Form) -> Call:
        if part == "forward":
            return lambda: form(qkv, positions, *tables, HeadNorm(*vectors) if vectors else None)
        leaves = [each.detach().requires_grad_() for each in (qkv, *vectors)]
        found = form(leaves[0], positions, *tables, HeadNorm(*leaves[1:]) if vectors else None)
        return lambda: torch.autograd.grad(found[:3], leaves, grads, retain_graph=True)

    return Forms(
        torch=call(qk_norm_rope.reference),
        ours=call(qk_norm_rope.fused),
        peers={
            "torch.compile": lambda: call(compiled(qk_norm_rope.reference)),  # type: ignore[arg-type]
            "Liger": lambda: call(_liger()),
        },
    )


def _liger() -> Form:
    """Liger's norms; it has no rotary embedding at packed positions, so that is ours in torch."""
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    def normalised(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        done: torch.Tensor
        if bias is None:
            done = LigerRMSNormFunction.apply(x, weight, eps)
        else:
            done = LigerLayerNormFunction.apply(x, weight, bias, eps)
        return done

    def form(
        qkv: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, norm: HeadNorm | None
    ) -> QueryKeyValue:
        query, key, value = torch.split(qkv, [qkv.shape[2] - 2, 1, 1], dim=2)
        query, key, value = query.flatten(1, 2), key.squeeze(2), value.squeeze(2)
        if norm is not None:
            query = normalised(query, norm.query_weight, norm.query_bias, norm.eps)
            key = normalised(key, norm.key_weight, norm.key_bias, norm.eps)
        angles = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
        return QueryKeyValue(rotate(query, *angles), rotate(key, *angles), value, None)

    return form
