"""Fused GeGLU against float64, torch's special values, and everything torch asks of an operator."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_checks import SPECIAL, assert_same_specials, every_finite_bfloat16, gradients, with_threads

from parallel.kernels import bias_gelu, extension, geglu
from parallel.kernels.bias_gelu import Approximate

built = pytest.mark.skipif(bool(extension.problem()), reason=f"kernels: {extension.problem()}")
both = pytest.mark.parametrize("approximate", ["none", "tanh"])
dtypes = pytest.mark.parametrize("dtype", geglu.DTYPES)


def random_pair(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """gate_up of `shape` and a gradient for its hidden; wide, so that all parts of exp are met."""
    generator = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(shape, generator=generator, dtype=torch.float64) * 5
    grad = torch.randn((*shape[:-1], shape[-1] // 2), generator=generator, dtype=torch.float64)
    return gate_up.to(dtype), grad.to(dtype)


def check(gate_up: torch.Tensor, grad: torch.Tensor, approximate: Approximate) -> None:
    """Against torch in float64, whose own errors are far below fp32's rounding."""
    mine = gradients(partial(geglu.fused, approximate=approximate), [gate_up], grad)
    gate, up = gate_up.double().chunk(2, dim=-1)
    true = gradients(partial(geglu.reference, approximate=approximate), [gate_up.double()], grad.double())
    rounding = 5e-7 if grad.dtype == torch.float32 else 2**-8
    size = 5e-7 * torch.special.ndtr(gate / 1.1) * (1 + gate.abs()) ** 3  # what roundings in gelu and its slope make
    upstream = grad.double()
    errors = [gate * up * size, torch.cat([upstream * up * (size + 1e-6), upstream * gate * size], dim=-1)]
    for one, right, error in zip(mine, true, errors, strict=True):
        assert one.dtype == grad.dtype
        assert bool(((one.double() - right).abs() <= rounding * right.abs() + error.abs() + 1e-13).all())


@built
@both
@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 6), max_size=2),
    width=st.integers(0, 300),
    dtype=st.sampled_from(geglu.DTYPES),
    seed=st.integers(0, 2**31),
)
def test_agrees_with_float64(
    approximate: Approximate, shape: list[int], width: int, dtype: torch.dtype, seed: int
) -> None:
    check(*random_pair(seed, (*shape, 2 * width), dtype), approximate)


@built
@both
@dtypes
def test_is_gelu_times_up_at_every_bfloat16_number(dtype: torch.dtype, approximate: Approximate) -> None:
    """`test_kernels_bias_gelu.py` holds that gelu against float64; the two share its code."""
    gate = every_finite_bfloat16().to(dtype)[None]
    gate = gate[gate.abs() < 1e18][None]
    nothing = torch.zeros_like(gate[0])
    hidden, grad_gate, _ = gradients(
        partial(bias_gelu.fused, approximate=approximate), [gate, nothing], torch.full_like(gate, 0.5)
    )
    mine, grad = gradients(
        partial(geglu.fused, approximate=approximate),
        [torch.cat([gate, torch.ones_like(gate)], dim=-1)],
        torch.full_like(gate, 0.5),
    )
    assert torch.equal(mine, hidden)
    assert torch.equal(grad.chunk(2, dim=-1)[0], grad_gate)
    normal = hidden.abs() > 1e-37  # half of it is then exact
    assert torch.equal(grad.chunk(2, dim=-1)[1][normal], hidden[normal] / 2)


@built
@both
@dtypes
def test_infinities_and_nan_go_where_torch_sends_them(dtype: torch.dtype, approximate: Approximate) -> None:
    values = torch.tensor(SPECIAL, dtype=dtype)
    gate, up, grad = (grid.reshape(-1, 1) for grid in torch.meshgrid(values, values, values, indexing="ij"))
    gate_up = torch.cat([gate, up], dim=-1)
    forms = [partial(form, approximate=approximate) for form in (geglu.fused, geglu.reference)]
    assert_same_specials(*(gradients(form, [gate_up], grad) for form in forms))


@built
@both
@dtypes
def test_the_same_bits_whatever_the_neighbours_and_threads(dtype: torch.dtype, approximate: Approximate) -> None:
    gate_up, grad = random_pair(3, (300, 2 * 331), dtype)
    form = partial(geglu.fused, approximate=approximate)
    whole, other = (with_threads(count, lambda: gradients(form, [gate_up], grad)) for count in (1, 3))
    assert all(torch.equal(one, two) for one, two in zip(whole, other, strict=True))
    for row in range(0, 300, 7):
        alone = gradients(form, [gate_up[row : row + 1]], grad[row : row + 1])
        assert all(torch.equal(mine[0], among[row]) for mine, among in zip(alone, whole, strict=True))
    for column in range(0, 331, 7):
        pair = [column, 331 + column]
        hidden, grads = gradients(form, [gate_up[:, pair]], grad[:, [column]])
        assert torch.equal(hidden, whole[0][:, [column]])
        assert torch.equal(grads, whole[1][:, pair])


@built
@pytest.mark.parametrize(
    ("gate_up", "error", "message"),
    [
        (torch.zeros(3, 5), ValueError, "shape [3, 5]; the last dimension is gate and up, so even"),
        (torch.tensor(1.0), ValueError, "shape []"),
        (torch.zeros(3, 4, dtype=torch.float64), TypeError, "gate_up is torch.float64; it takes torch.float32"),
        (torch.zeros(3, 4, dtype=torch.float16), TypeError, "torch.float16"),
        (torch.zeros(4, 3).t(), ValueError, "has strides [1, 3]; call .contiguous() on it"),
    ],
)
def test_what_it_does_not_take_is_refused(gate_up: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        geglu.fused(gate_up)
    assert message in str(raised.value)
    with pytest.raises(RuntimeError, match="headrace::geglu_forward: "):  # the operator itself checks again
        torch.ops.headrace.geglu_forward(gate_up, True)


@built
@pytest.mark.parametrize(
    ("grad", "message"),
    [
        (torch.zeros(2, 3), "half its last dimension"),
        (torch.zeros(3, 3, dtype=torch.bfloat16), "same dtype"),
        (torch.zeros(3, 3).t(), "grad must be contiguous"),
    ],
)
def test_gradients_that_do_not_fit_are_refused(grad: torch.Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.headrace.geglu_backward(grad, torch.zeros(3, 6), False)


@built
def test_expanded_gradients_and_no_second_derivative() -> None:
    gate_up = torch.randn(3, 8, requires_grad=True)
    geglu.fused(gate_up).sum().backward()  # an expanded gradient, of stride 0
    assert gate_up.grad is not None
    true = gradients(geglu.reference, [gate_up], torch.ones(3, 4))[1]
    torch.testing.assert_close(gate_up.grad, true, rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(geglu.fused(gate_up).sum(), gate_up, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


@built
@dtypes
@pytest.mark.parametrize("shape", [(5, 3, 14), (0, 6)])
def test_torch_finds_the_operators_sound(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate_up, grad = random_pair(0, shape, dtype)
    torch.library.opcheck(torch.ops.headrace.geglu_backward, (grad, gate_up, False))
    torch.library.opcheck(torch.ops.headrace.geglu_forward, (gate_up.requires_grad_(), True))


@built
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic: bool) -> None:
    compiled = torch.compile(geglu.fused, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 5):
        gate_up, grad = random_pair(rows, (rows, 2, 12), torch.float32)
        pairs = zip(gradients(compiled, [gate_up], grad), gradients(geglu.fused, [gate_up], grad), strict=True)
        assert all(torch.equal(mine, eager) for mine, eager in pairs)


@both
def test_reference_is_right_in_float64(approximate: Approximate) -> None:
    gate_up = random_pair(1, (4, 6), torch.float64)[0].requires_grad_()
    assert torch.autograd.gradcheck(partial(geglu.reference, approximate=approximate), (gate_up,))
