"""Fused sums of squares against float64; the same bits whoever computes them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.kernels import extension, grad_norm

pytestmark = pytest.mark.skipif(bool(extension.problem()), reason=f"kernels: {extension.problem()}")
INF, NAN = float("inf"), float("nan")


def gradients(sizes: list[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, generator=generator) * 10.0 ** (number - 2)).to(dtype) for number, size in enumerate(sizes)
    ]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(
        st.integers(0, 99) | st.sampled_from([1023, 1024, 1040, 16384, 16385, 40001]), min_size=1, max_size=6
    ),
    dtype=st.sampled_from(grad_norm.DTYPES),
    seed=st.integers(0, 2**31),
)
def test_agrees_with_float64(sizes: list[int], dtype: torch.dtype, seed: int) -> None:
    own = gradients(sizes, dtype, seed)
    for ours, true in zip(grad_norm.fused(own), grad_norm.reference(own), strict=True):
        assert (ours.dtype, ours.shape) == (true.dtype, true.shape)
        torch.testing.assert_close(ours, true, rtol=5e-7, atol=0.0)


@pytest.mark.parametrize("dtype", grad_norm.DTYPES)
def test_threads_cuts_and_repetition_change_no_bit(dtype: torch.dtype) -> None:
    own = gradients([300_007, 5, 0, 16_384 * 3, 70_000], dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            results.append(grad_norm.fused(own))
    finally:
        torch.set_num_threads(threads)
    alone = torch.cat([grad_norm.fused([each])[0] for each in own])
    for sums, total, flag in results:
        assert torch.equal(sums, results[0][0])
        assert torch.equal(sums, alone)
        assert torch.equal(total, results[0][1])
        assert flag.tolist() == [0.0]


@pytest.mark.parametrize("dtype", grad_norm.DTYPES)
@pytest.mark.parametrize("bad", [INF, -INF, NAN, 3e38])
@pytest.mark.parametrize("at", [0, 1000, 16_399])
def test_says_what_is_not_finite(bad: float, at: int, dtype: torch.dtype) -> None:
    """3e38 is a number, but its square is not: as in torch, the norm is infinite."""
    own = gradients([30, 16_400], dtype)
    own[1][at] = bad
    sums, total, flag = grad_norm.fused(own)
    assert math.isfinite(float(sums[0]))
    assert not math.isfinite(float(sums[1]))
    assert not math.isfinite(float(total))
    assert math.isnan(float(total)) == math.isnan(bad)
    assert flag.tolist() == [1.0]


@pytest.mark.parametrize(
    ("own", "error", "message"),
    [
        ([], ValueError, "there is no gradient"),
        ([torch.zeros(3).double()], TypeError, "gradients[0] is torch.float64"),
        ([torch.zeros(3), torch.zeros(3).bfloat16()], TypeError, "gradients[1] is torch.bfloat16 and gradients[0]"),
        ([torch.zeros(3), torch.zeros(4, 3).t()], ValueError, "gradients[1] of shape [3, 4] has strides [1, 3]"),
        ([torch.zeros(3), torch.zeros(3, device="meta")], ValueError, "gradients[1] is on meta, others on cpu"),
    ],
)
def test_what_it_does_not_take_is_refused(own: list[torch.Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        grad_norm.fused(own)
    assert message in str(raised.value)


@pytest.mark.parametrize("dtype", grad_norm.DTYPES)
def test_torch_finds_the_operator_sound(dtype: torch.dtype) -> None:
    torch.library.opcheck(torch.ops.headrace.square_sums, (gradients([33, 0, 7], dtype),))


def test_compiles_into_one_graph() -> None:
    own = gradients([33, 7])
    compiled = torch.compile(grad_norm.fused, fullgraph=True, backend="aot_eager")(own)
    assert all(torch.equal(a, b) for a, b in zip(compiled, grad_norm.fused(own), strict=True))
