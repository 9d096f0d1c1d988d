"""Norm and rotary embedding (RoPE) of queries and keys, straight from the fused QKV projection.

Both forms take `qkv`, [tokens, groups, queries per group + 2, head size], as megatron-core lays out the output of its
fused QKV projection: each group holds its queries, then its key, then its value. They give `query` [tokens, heads, head
size], `key` and `value` [tokens, groups, head size]:

    normalised   x̂ = x / rms(x) (RMSNorm, arXiv 1910.07467) or (x − mean) / deviation (LayerNorm, arXiv 1607.06450) of
                 each head on its own, times a weight, plus a bias; one weight for all queries, one for all keys
                 (QK-norm, arXiv 2302.05442, section 2). Without weights: left as they are
    rotated      dimension i with i + head size / 2, by the row of `cos` and `sin` that `positions` names (RoPE, arXiv
                 2104.09864, in the order of GPT-NeoX and Hugging Face's Llama). Positions begin again at each document,
                 and come in any order; YaRN's larger cosines are larger cosines

Values are a view of `qkv` in both. The fused form goes through memory once: in bf16 forward moves 4 bytes for each
number of queries and keys, and backward 6 for these and 4 for each number of values, whose gradient it writes into
`qkv`'s; torch in eager mode moves five to ten times that. For the backward pass it keeps `qkv` and one fp32 number for
each head (two for LayerNorm). It computes in fp32 and rounds once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from parallel.kernels import extension
from parallel.kernels.choice import Kernel
from parallel.kernels.self_test import Trial
from parallel.rotary import rotary_table, rotate

DTYPES = (torch.float32, torch.bfloat16)
"""What the fused form takes."""
FASTER_ON = frozenset({"cpu"})
"""Devices where `benchmarks/kernels.py` measured the fused form to be faster (benchmarks/results/kernels.json). CUDA is
missing because no GPU was at hand: there `auto` is torch until somebody has measured."""

KERNEL = Kernel("qk_norm_rope", ("qk_norm_rope_forward", "qk_norm_rope_backward"), FASTER_ON)


class HeadNorm(NamedTuple):
    """The norm of queries and of keys: LayerNorm with biases, else RMSNorm. All are [head size] of `qkv`'s dtype."""

    query_weight: torch.Tensor
    key_weight: torch.Tensor
    query_bias: torch.Tensor | None = None
    key_bias: torch.Tensor | None = None
    eps: float = 1e-5


class QueryKeyValue(NamedTuple):
    """What attention multiplies."""

    query: torch.Tensor
    """[tokens, groups · queries per group, head size]"""
    key: torch.Tensor
    """[tokens, groups, head size]"""
    value: torch.Tensor
    """[tokens, groups, head size], a view of `qkv`"""
    lengths: torch.Tensor | None
    """float32[tokens, groups, queries per group + 1], where asked for: the length (2-norm) of each query and key as
    they are in `query` and `key`. scale · (longest query) · (longest key) is a bound on every attention logit."""


def reference(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norm: HeadNorm | None = None,
    with_lengths: bool = False,
) -> QueryKeyValue:
    """By torch's own operators; any floating dtype and strides.

    `qkv` [tokens, groups, queries per group + 2, head size], `positions` int[tokens], `cos` and `sin` [positions there
    are, head size / 2] as `parallel.rotary.rotary_table` makes them.
    """
    tokens, groups, parts, size = qkv.shape
    query, key, value = torch.split(qkv, [parts - 2, 1, 1], dim=2)
    query, key, value = query.flatten(1, 2), key.squeeze(2), value.squeeze(2)
    if norm is not None:
        query = _normalised(query, norm.query_weight, norm.query_bias, norm.eps)
        key = _normalised(key, norm.key_weight, norm.key_bias, norm.eps)
    angles = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    query, key = rotate(query, *angles), rotate(key, *angles)
    lengths = None
    if with_lengths:
        heads = torch.cat([query.detach().view(tokens, groups, parts - 2, size), key.detach().unsqueeze(2)], dim=2)
        lengths = torch.linalg.vector_norm(heads, dim=-1, dtype=max(qkv.dtype, torch.float32, key=lambda d: d.itemsize))
    return QueryKeyValue(query, key, value, lengths)


def _normalised(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    if bias is None:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def fused(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norm: HeadNorm | None = None,
    with_lengths: bool = False,
) -> QueryKeyValue:
    """In one pass over memory. As `reference`, with everything contiguous, and `cos`, `sin` of `qkv`'s dtype.

    `qkv` fp32 or bf16; `positions` int32 or int64. Differentiable once, under autograd and torch.compile; the gradients
    of weights and biases are summed in fp32 in an order that depends on shapes alone. Raises TypeError for other
    dtypes, ValueError for other shapes, strides and mixed devices. On a CPU a position outside the tables is a
    RuntimeError, on a GPU it makes NaN.
    """
    _check(qkv, positions, cos, sin, norm)
    parameters = norm or _NO_NORM
    query, key, value, lengths = _Fused.apply(  # type: ignore[no-untyped-call]
        qkv, positions, cos, sin, *parameters, with_lengths
    )
    return QueryKeyValue(query, key, value, lengths if with_lengths else None)


_NO_NORM = (None, None, None, None, 0.0)


class _Fused(torch.autograd.Function):
    """A Function and no gradient registered with the operator: `value` is a view of `qkv`, and an operator's result may
    not be. Its gradient must come through here all the same, to be written together with that of the rest."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        query_weight: torch.Tensor | None,
        key_weight: torch.Tensor | None,
        query_bias: torch.Tensor | None,
        key_bias: torch.Tensor | None,
        eps: float,
        with_lengths: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        parameters = (query_weight, key_weight, query_bias, key_bias)
        query, key, statistics, lengths = torch.ops.headrace.qk_norm_rope_forward(
            qkv, positions, cos, sin, *parameters, eps, with_lengths
        )
        ctx.save_for_backward(qkv, positions, cos, sin, query_weight, key_weight, statistics)
        ctx.mark_non_differentiable(lengths)
        return query, key, qkv[:, :, -1], lengths

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        qkv, positions, cos, sin, query_weight, key_weight, statistics = ctx.saved_tensors
        # sum().backward() and the like send expanded gradients
        grad_qkv, grad_weights = torch.ops.headrace.qk_norm_rope_backward(
            *(grad.contiguous() for grad in grads[:3]), qkv, positions, cos, sin, query_weight, key_weight, statistics
        )
        of_weights: list[torch.Tensor | None] = [None] * 4
        for kind in range(grad_weights.size(1)):  # weights, then biases
            of_weights[2 * kind : 2 * kind + 2] = grad_weights[:, kind].to(qkv.dtype).unbind()
        return grad_qkv, None, None, None, *of_weights, None, None


def _check(
    qkv: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, norm: HeadNorm | None
) -> None:
    if qkv.dtype not in DTYPES:
        raise TypeError(f"fused qk_norm_rope: qkv is {qkv.dtype}; it takes torch.float32 and torch.bfloat16")
    if qkv.dim() != 4 or qkv.shape[2] < 3 or qkv.shape[3] == 0 or qkv.shape[3] % 2:
        raise ValueError(
            f"fused qk_norm_rope: qkv has shape {list(qkv.shape)}; it must be [tokens, groups, queries per group + 2, "
            "head size] with an even head size"
        )
    if positions.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"fused qk_norm_rope: positions are {positions.dtype}; it takes torch.int32 and torch.int64")
    tokens, _, _, size = qkv.shape
    vectors = norm[:4] if norm else ()
    if norm is not None and (norm.query_bias is None) != (norm.key_bias is None):
        raise ValueError("fused qk_norm_rope: one of query_bias and key_bias is missing; give both (LayerNorm) or none")
    expected: list[tuple[str, torch.Tensor | None, tuple[int, ...]]] = [
        ("qkv", qkv, tuple(qkv.shape)),
        ("positions", positions, (tokens,)),
        ("cos", cos, (cos.shape[0] if cos.dim() else 0, size // 2)),
        ("sin", sin, tuple(cos.shape)),
        *((name, vector, (size,)) for name, vector in zip(HeadNorm._fields, vectors, strict=False)),
    ]
    for name, tensor, shape in expected:
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"fused qk_norm_rope: {name} has shape {list(tensor.shape)}, expected {list(shape)}")
        if tensor is not positions and tensor.dtype != qkv.dtype:
            raise TypeError(f"fused qk_norm_rope: {name} is {tensor.dtype}, qkv {qkv.dtype}; they must be the same")
        if tensor.device != qkv.device:
            raise ValueError(f"fused qk_norm_rope: {name} is on {tensor.device}, qkv on {qkv.device}")
        if not tensor.is_contiguous():
            raise ValueError(
                f"fused qk_norm_rope: {name} of shape {list(tensor.shape)} has strides {list(tensor.stride())}; "
                "call .contiguous() on it"
            )


def _statistics_per_head(query_weight: torch.Tensor | None, query_bias: torch.Tensor | None) -> int:
    return 0 if query_weight is None else 1 if query_bias is None else 2


def _forward_shape(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    query_bias: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    eps: float,
    with_lengths: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, groups, parts, size = qkv.shape
    heads = (tokens, groups, parts - 1)
    return (
        qkv.new_empty((tokens, groups * (parts - 2), size)),
        qkv.new_empty((tokens, groups, size)),
        qkv.new_empty((*heads, _statistics_per_head(query_weight, query_bias)), dtype=torch.float32),
        qkv.new_empty(heads if with_lengths else (0,), dtype=torch.float32),
    )


def _backward_shape(
    grad_query: torch.Tensor,
    grad_key: torch.Tensor,
    grad_value: torch.Tensor,
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    statistics: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(qkv), statistics.new_empty((2, statistics.shape[-1], qkv.shape[-1]))


def _trial_inputs() -> tuple[torch.Tensor, ...]:
    """512 tokens of 16 + 4 heads of 128, under LayerNorm."""
    tables = rotary_table(512, 128, 1e4, torch.float64, torch.device("cpu"))
    vectors = torch.randn(4, 128, dtype=torch.float64).unbind()
    return torch.randn(512, 4, 6, 128, dtype=torch.float64), torch.randint(0, 512, (512,)), *tables, *vectors


def _tried(form: Callable[..., QueryKeyValue]) -> Callable[..., tuple[torch.Tensor, ...]]:
    def three(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query_weight, key_weight, query_bias, key_bias = inputs[4:]
        return form(*inputs[:4], HeadNorm(query_weight, key_weight, query_bias, key_bias))[:3]

    return three


TRIAL = Trial(KERNEL, _trial_inputs, _tried(fused), _tried(reference))


def _register() -> None:
    """Tell torch the operators' shapes; their code is in the library already."""
    torch.library.register_fake("headrace::qk_norm_rope_forward", _forward_shape)
    torch.library.register_fake("headrace::qk_norm_rope_backward", _backward_shape)


if extension.has(*KERNEL.operators):
    _register()
