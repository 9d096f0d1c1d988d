"""Fused bias and GELU against float64, torch's special values, and everything torch asks of an operator."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_checks import SPECIAL, assert_same_specials, every_finite_bfloat16, gradients, with_threads

from parallel.kernels import bias_gelu, extension
from parallel.kernels.bias_gelu import Approximate

built = pytest.mark.skipif(bool(extension.problem()), reason=f"kernels: {extension.problem()}")
both = pytest.mark.parametrize("approximate", ["none", "tanh"])
dtypes = pytest.mark.parametrize("dtype", bias_gelu.DTYPES)
ROUNDING = {torch.float32: 5e-7, torch.bfloat16: 2**-8}


def random_inputs(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """[input of `shape`, its bias], and a gradient of what comes out; wide, so that all parts of exp are met."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(each, generator=generator, dtype=torch.float64) for each in (shape, shape[-1:], shape)]
    return [(drawn[0] * 5).to(dtype), drawn[1].to(dtype)], drawn[2].to(dtype)


def factor_and_slope(z: torch.Tensor, approximate: Approximate) -> tuple[torch.Tensor, torch.Tensor]:
    """gelu(z) / z and gelu'(z) in float64. torch's own gelu has no digit left of the tails, since it takes 1 + erf."""
    if approximate == "none":
        factor = torch.special.erfc(-z / 2**0.5) / 2
        return factor, factor + z * torch.exp(-z.square() / 2) / (2 * torch.pi) ** 0.5
    scale = (2 / torch.pi) ** 0.5
    factor = torch.sigmoid(2 * scale * (z + 0.044715 * z**3))
    other = torch.sigmoid(-2 * scale * (z + 0.044715 * z**3))  # 1 - factor
    return factor, factor + 2 * z * factor * other * scale * (1 + 3 * 0.044715 * z.square())


def check_against_float64(inputs: list[torch.Tensor], grad: torch.Tensor, approximate: Approximate) -> None:
    hidden, grad_input, grad_bias = gradients(partial(bias_gelu.fused, approximate=approximate), inputs, grad)
    assert hidden.dtype == grad_input.dtype == grad_bias.dtype == grad.dtype
    z, upstream = inputs[0].double() + inputs[1].double(), grad.double()
    factor, slope = factor_and_slope(z, approximate)
    # A rounding of z becomes one of z^2 (exact) or z^3 (tanh) times as much in what exp(-z^2/2) or exp(u) makes of it.
    wide = 5e-7 * (1 + z.abs() ** (2 if approximate == "none" else 3))
    off = upstream.abs() * (factor + (slope - factor).abs()) * wide
    rounding, flat = ROUNDING[grad.dtype], (-1, z.size(-1)) if z.numel() else (0, z.size(-1))
    for mine, true, error in (
        (hidden, z * factor, (z * factor).abs() * wide),
        (grad_input, upstream * slope, off),
        (grad_bias, (upstream * slope).reshape(flat).sum(0), (off + 1e-7 * upstream.abs()).reshape(flat).sum(0)),
    ):
        assert bool(((mine.double() - true).abs() <= rounding * true.abs() + error + 1e-35).all())


@built
@both
@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 6), max_size=2),
    width=st.integers(0, 300),
    dtype=st.sampled_from(bias_gelu.DTYPES),
    seed=st.integers(0, 2**31),
)
def test_agrees_with_float64(
    approximate: Approximate, shape: list[int], width: int, dtype: torch.dtype, seed: int
) -> None:
    check_against_float64(*random_inputs(seed, (*shape, width), dtype), approximate)


@built
@both
@dtypes
@pytest.mark.parametrize("rows", [63, 64, 65, 200])
def test_the_bias_is_summed_over_every_chunk_of_rows(rows: int, dtype: torch.dtype, approximate: Approximate) -> None:
    check_against_float64(*random_inputs(rows, (rows, 19), dtype), approximate)


@built
@both
@dtypes
def test_agrees_with_float64_at_every_bfloat16_number(dtype: torch.dtype, approximate: Approximate) -> None:
    numbers = every_finite_bfloat16().to(dtype)
    numbers = numbers[numbers.abs() < 1e18]  # beyond, the slope of torch's tanh form is infinity times zero
    near = numbers[numbers > -6][None]
    check_against_float64([near, torch.zeros_like(near[0])], torch.full_like(near, 0.5), approximate)
    far = numbers[numbers < -13][None]
    hidden, grad, _ = gradients(
        partial(bias_gelu.fused, approximate=approximate), [far, torch.zeros_like(far[0])], torch.ones_like(far)
    )
    assert float(hidden.abs().max()) < 1e-30
    assert float(grad.abs().max()) < 1e-30


@built
def test_tails_keep_their_digits() -> None:
    """1 + erf, which torch's CPU kernel takes, has no digit left of them."""
    z = -torch.linspace(4, 12, 33)
    hidden = bias_gelu.fused(z, torch.zeros(33)).double()
    true = z.double() * torch.exp(torch.special.log_ndtr(z.double()))
    assert float(((hidden - true) / true).abs().max()) < 2e-5
    assert float(((bias_gelu.reference(z, torch.zeros(33)).double() - true) / true).abs().max()) > 0.5


@built
@both
@dtypes
def test_infinities_and_nan_go_where_torch_sends_them(dtype: torch.dtype, approximate: Approximate) -> None:
    values = torch.tensor(SPECIAL, dtype=dtype)
    input, bias, grad = (grid.reshape(-1) for grid in torch.meshgrid(values, values, values, indexing="ij"))
    forms = [partial(form, approximate=approximate) for form in (bias_gelu.fused, bias_gelu.reference)]
    assert_same_specials(*(gradients(form, [input[None], bias], grad[None]) for form in forms))


@built
@both
@dtypes
def test_the_same_bits_whatever_the_neighbours_and_threads(dtype: torch.dtype, approximate: Approximate) -> None:
    (input, bias), grad = random_inputs(3, (300, 331), dtype)
    form = partial(bias_gelu.fused, approximate=approximate)
    whole, other = (with_threads(count, lambda: gradients(form, [input, bias], grad)) for count in (1, 3))
    assert all(torch.equal(one, two) for one, two in zip(whole, other, strict=True))
    rows = [gradients(form, [input[i : i + 1], bias], grad[i : i + 1]) for i in range(0, 300, 7)]
    assert torch.equal(torch.cat([row[0] for row in rows]), whole[0][::7])
    assert torch.equal(torch.cat([row[1] for row in rows]), whole[1][::7])
    columns = [
        gradients(form, [input[:, i : i + 1].contiguous(), bias[i : i + 1]], grad[:, i : i + 1]) for i in range(331)
    ]
    for at in range(3):
        assert torch.equal(torch.cat([column[at] for column in columns], dim=-1), whole[at])


@built
@pytest.mark.parametrize(
    ("input", "bias", "error", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(3), ValueError, "bias [3]; bias must be as long as input's last dimension"),
        (torch.zeros(3, 4), torch.zeros(1, 4), ValueError, "bias [1, 4]"),
        (torch.tensor(1.0), torch.zeros(1), ValueError, "input has shape []"),
        (
            torch.zeros(3, 4).double(),
            torch.zeros(4).double(),
            TypeError,
            "input is torch.float64; it takes torch.float32",
        ),
        (torch.zeros(3, 4).half(), torch.zeros(4).half(), TypeError, "torch.float16"),
        (torch.zeros(3, 4), torch.zeros(4).bfloat16(), TypeError, "they must be of one dtype"),
        (torch.zeros(4, 3).t(), torch.zeros(4), ValueError, "input of shape [3, 4] has strides [1, 3]; call"),
        (torch.zeros(3, 4), torch.zeros(8)[::2], ValueError, "bias of shape [4] has strides [2]"),
    ],
)
def test_what_it_does_not_take_is_refused(
    input: torch.Tensor, bias: torch.Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as raised:
        bias_gelu.fused(input, bias)
    assert message in str(raised.value)
    with pytest.raises(RuntimeError, match="headrace::bias_gelu_forward: "):  # the operator itself checks again
        torch.ops.headrace.bias_gelu_forward(input, bias, False)


def test_a_bias_on_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match="bias is on meta, input on cpu; move one of them"):
        bias_gelu.fused(torch.zeros(3, 4), torch.zeros(4, device="meta"))


@built
@pytest.mark.parametrize(
    ("grad", "message"),
    [
        (torch.zeros(2, 4), "the same shape"),
        (torch.zeros(12), "the same shape"),
        (torch.zeros(3, 4).bfloat16(), "the same dtype"),
        (torch.zeros(4, 3).t(), "grad must be contiguous"),
    ],
)
def test_gradients_that_do_not_fit_are_refused(grad: torch.Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.headrace.bias_gelu_backward(grad, torch.zeros(3, 4), torch.zeros(4), False)


@built
def test_expanded_gradients_and_no_second_derivative() -> None:
    input, bias = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    bias_gelu.fused(input, bias).sum().backward()  # an expanded gradient, of stride 0
    assert input.grad is not None
    torch.testing.assert_close(
        input.grad, gradients(bias_gelu.reference, [input, bias], torch.ones(3, 8))[1], rtol=1e-5, atol=1e-6
    )
    (grad,) = torch.autograd.grad(bias_gelu.fused(input, bias).sum(), input, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


@built
@dtypes
@pytest.mark.parametrize("shape", [(5, 3, 14), (0, 6)])
def test_torch_finds_the_operators_sound(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    (input, bias), grad = random_inputs(0, shape, dtype)
    torch.library.opcheck(torch.ops.headrace.bias_gelu_backward, (grad, input, bias, True))
    leaves = (input.requires_grad_(), bias.requires_grad_())
    torch.library.opcheck(torch.ops.headrace.bias_gelu_forward, (*leaves, False))


@built
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic: bool) -> None:
    compiled = torch.compile(bias_gelu.fused, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 5):
        inputs, grad = random_inputs(rows, (rows, 2, 12), torch.float32)
        pairs = zip(gradients(compiled, inputs, grad), gradients(bias_gelu.fused, inputs, grad), strict=True)
        assert all(torch.equal(mine, eager) for mine, eager in pairs)


@both
def test_reference_is_right_in_float64(approximate: Approximate) -> None:
    inputs, _ = random_inputs(1, (4, 6), torch.float64)
    form = partial(bias_gelu.reference, approximate=approximate)
    assert torch.autograd.gradcheck(form, tuple(each.requires_grad_() for each in inputs))
    z = (inputs[0] + inputs[1]).detach()
    torch.testing.assert_close(form(*inputs).detach(), z * factor_and_slope(z, approximate)[0])
