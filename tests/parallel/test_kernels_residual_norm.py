"""Fused residual addition and norm against float64, torch's special values, and all that torch asks of an operator."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.kernels import choice, extension, residual_norm

built = pytest.mark.skipif(bool(extension.problem()), reason=f"kernels: {extension.problem()}")
NAMES = ("x", "residual", "weight", "bias")
KINDS = [(residual, layer_norm) for residual in (False, True) for layer_norm in (False, True)]
kinds = pytest.mark.parametrize(("residual", "layer_norm"), KINDS)
dtypes = pytest.mark.parametrize("dtype", residual_norm.DTYPES)
Inputs = dict[str, torch.Tensor | None]
Form = Callable[..., Any]


def random_inputs(
    seed: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    weights: torch.dtype | None = None,
    residual: bool = True,
    layer_norm: bool = True,
) -> tuple[Inputs, list[torch.Tensor]]:
    """(the four inputs, gradients of normalised and stream)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) + mean).to(dtype)

    inputs: Inputs = {
        "x": draw(shape, dtype, mean=0.5),
        "residual": draw(shape, dtype) * 3 if residual else None,
        "weight": draw(shape[-1:], weights or dtype, mean=1.0),
        "bias": draw(shape[-1:], weights or dtype) if layer_norm else None,
    }
    return inputs, [draw(shape, dtype), draw(shape, dtype)]


def everything(form: Form, inputs: Inputs, grads: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Outputs, and gradients by the inputs' names."""
    leaves = {name: None if x is None else x.detach().clone().requires_grad_() for name, x in inputs.items()}
    normalised, stream, *_ = form(*leaves.values())
    outputs = [normalised] if leaves["residual"] is None else [normalised, stream]
    torch.autograd.backward(outputs, grads[: len(outputs)])
    found = {"normalised": normalised.detach(), "stream": stream.detach()}
    for name, leaf in leaves.items():
        if leaf is not None:
            assert leaf.grad is not None
            found[f"grad of {name}"] = leaf.grad
    return found


def double(inputs: Inputs, grads: list[torch.Tensor]) -> tuple[Inputs, list[torch.Tensor]]:
    """In float64, the sum of x and residual rounded as it is on the way."""
    wide = {name: None if x is None else x.double() for name, x in inputs.items()}
    x, residual = inputs["x"], inputs["residual"]
    assert x is not None
    if residual is not None:
        wide["x"] = (x + residual).double() - residual.double()
    return wide, [grad.double() for grad in grads]


def check_against_float64(inputs: Inputs, grads: list[torch.Tensor]) -> None:
    found = everything(residual_norm.fused, inputs, grads)
    true = everything(residual_norm.reference, *double(inputs, grads))
    for name, expected in true.items():
        tolerance = 4e-6 if found[name].dtype == torch.float32 else 2**-8
        scale = float(expected.abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(
            found[name].double(),
            expected,
            rtol=tolerance,
            atol=tolerance * scale / 2,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@built
@settings(max_examples=100, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), max_size=2),
    width=st.integers(4, 300),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(residual_norm.DTYPES),
    weights=st.sampled_from(residual_norm.DTYPES),
    seed=st.integers(0, 2**31),
)
def test_agrees_with_float64(
    shape: list[int], width: int, kind: tuple[bool, bool], dtype: torch.dtype, weights: torch.dtype, seed: int
) -> None:
    check_against_float64(*random_inputs(seed, (*shape, width), dtype, weights, *kind))


@built
@dtypes
@kinds
@pytest.mark.parametrize("shape", [(3000, 17), (130, 4096), (2, 139_776), (40, 1), (3, 2)])
def test_agrees_with_float64_at_sizes_that_are_cut(
    shape: tuple[int, ...], residual: bool, layer_norm: bool, dtype: torch.dtype
) -> None:
    """Rows in many groups and a last one that is not full, a model's rows, and rows longer than any cache."""
    inputs, grads = random_inputs(1, shape, dtype, None, residual, layer_norm)
    if shape[-1] > 2 or not layer_norm:
        check_against_float64(inputs, grads)
    else:  # one or two numbers around their mean: what is left is eps and rounding, and needs no more than to be finite
        assert all(found.isfinite().all() for found in everything(residual_norm.fused, inputs, grads).values())


@built
@dtypes
@kinds
def test_square_sums_are_those_of_the_stream(residual: bool, layer_norm: bool, dtype: torch.dtype) -> None:
    """To 1e-6, also of rows that are all but constant; and nothing is differentiated through them."""
    inputs, _ = random_inputs(2, (64, 1000), dtype, None, residual, layer_norm)
    assert inputs["x"] is not None
    inputs["x"][7] = 100.0
    if inputs["residual"] is not None:
        inputs["residual"][7] = 1e-3
    normed = residual_norm.fused(*(None if x is None else x.requires_grad_() for x in inputs.values()))
    assert not normed.square_sum.requires_grad
    true = normed.stream.detach().double().square().sum(-1)
    torch.testing.assert_close(normed.square_sum.double(), true, rtol=1e-6, atol=0)


@built
@dtypes
@kinds
def test_infinities_and_nan_go_where_torch_sends_them(residual: bool, layer_norm: bool, dtype: torch.dtype) -> None:
    """Which of them a gradient is depends on the order of subtractions; that it is none of the numbers does not."""
    inputs, grads = random_inputs(3, (12, 40), dtype, None, residual, layer_norm)
    x = inputs["x"]
    assert x is not None
    inf, nan = float("inf"), float("nan")
    for row, value in enumerate((nan, inf, -inf, 3e38, 0.0)):
        x[row, 3] = value
    x[5] = 0.0
    grads[0][6, 2], grads[0][7, 2], grads[1][8, 2] = nan, inf, inf
    mine, torchs = (everything(form, inputs, grads) for form in (residual_norm.fused, residual_norm.reference))
    for name, expected in torchs.items():
        found = mine[name]
        if name.startswith("grad"):
            # 3e38 squared is infinite: there torch's chain of operators gives NaN for that number, ours 0
            same = found.isfinite() == expected.isfinite()
            if same.dim() == 2:
                same[3] = True
            assert same.all(), name
        else:
            assert torch.equal(found.isnan(), expected.isnan()), name
            assert torch.equal(found.isinf(), expected.isinf()), name


@built
@dtypes
@kinds
def test_the_same_bits_with_any_number_of_threads_and_rows(
    residual: bool, layer_norm: bool, dtype: torch.dtype
) -> None:
    """Outputs and gradients of rows do not depend on their neighbours; sums over rows not on threads."""
    inputs, grads = random_inputs(4, (700, 331), dtype, None, residual, layer_norm)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)  # 231,700 numbers: enough for three of them
            found.append(everything(residual_norm.fused, inputs, grads))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(other[name], found[0][name]) for name in found[0])
    rows = slice(100, 103)
    cut = {name: x[rows] if x is not None and x.dim() == 2 else x for name, x in inputs.items()}
    alone = everything(residual_norm.fused, cut, [grad[rows] for grad in grads])
    for name in ("normalised", "stream", "grad of x"):
        assert torch.equal(alone[name], found[0][name][rows]), name


@built
@dtypes
def test_a_sum_over_many_rows_keeps_its_digits(dtype: torch.dtype) -> None:
    """32,000 rows: one in bf16 would stop growing at 256."""
    rows = 32_000
    x = torch.ones(rows, 8, dtype=dtype)
    x[:, ::2] = -1
    grad = torch.full((rows, 8), 1.01, dtype=dtype)
    weight = torch.ones(8, requires_grad=True)
    residual_norm.fused(x, None, weight, eps=0.0).normalised.backward(grad)
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad.double(), (x.double() * grad.double()).sum(0), rtol=2e-5, atol=0)


@built
def test_one_of_the_two_gradients_is_enough() -> None:
    inputs, grads = random_inputs(5, (6, 40), torch.float32)
    for wanted in (0, 1):
        found = []
        for form in (residual_norm.fused, residual_norm.reference):
            leaves = [None if x is None else x.clone().requires_grad_() for x in inputs.values()]
            form(*leaves)[wanted].backward(grads[wanted])
            found.append([None if leaf is None else leaf.grad for leaf in leaves])
        for mine, torchs in zip(*found, strict=True):
            assert (mine is None) == (torchs is None)
            if torchs is not None:
                torch.testing.assert_close(mine, torchs, rtol=1e-5, atol=1e-5)


ROW = torch.ones(5)


@built
@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ((torch.zeros(3, 5, dtype=torch.float64), None, ROW, None), TypeError, "x is torch.float64; it takes"),
        ((torch.zeros(3, 5, dtype=torch.float16), None, ROW, None), TypeError, "x is torch.float16"),
        ((torch.zeros(3, 5), None, ROW.long(), None), TypeError, "weight is torch.int64"),
        ((torch.tensor(1.0), None, ROW, None), ValueError, "x has shape []"),
        ((torch.zeros(3, 0), None, torch.zeros(0), None), ValueError, "x has shape [3, 0]"),
        ((torch.zeros(5, 3).t(), None, ROW, None), ValueError, "x of shape [3, 5] has strides [1, 3]"),
        ((torch.zeros(3, 5), torch.zeros(5, 3).t(), ROW, None), ValueError, "residual of shape [3, 5] has strides"),
        ((torch.zeros(3, 5), torch.zeros(2, 5), ROW, None), ValueError, "residual has shape [2, 5]"),
        ((torch.zeros(3, 5), torch.zeros(3, 5).bfloat16(), ROW, None), TypeError, "residual is torch.bfloat16, x is"),
        ((torch.zeros(3, 5), None, torch.ones(4), None), ValueError, "weight has shape [4]; beside x it is [5]"),
        ((torch.zeros(3, 5), None, ROW, torch.ones(1)), ValueError, "bias has shape [1]"),
        ((torch.zeros(3, 5), None, ROW, ROW.bfloat16()), TypeError, "bias is torch.bfloat16, weight is torch.float32"),
        ((torch.zeros(3, 5), None, torch.ones(10)[::2], None), ValueError, "weight of shape [5] has strides [2]"),
        ((torch.zeros(3, 5), None, torch.ones(5, device="meta"), None), ValueError, "weight is on meta, x on cpu"),
    ],
)
def test_what_it_does_not_take_is_refused(
    inputs: tuple[torch.Tensor | None, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as raised:
        residual_norm.fused(*inputs)  # type: ignore[arg-type]
    assert message in str(raised.value)
    x, residual, weight, bias = inputs
    assert x is not None
    assert weight is not None
    if weight.device != x.device:
        return
    name = f"{'' if residual is None else 'residual_'}{'rms_norm' if bias is None else 'layer_norm'}_forward"
    with pytest.raises(RuntimeError, match=f"headrace::{name}: "):  # the operator itself checks again
        getattr(torch.ops.headrace, name)(*(each for each in inputs if each is not None), 1e-5)


@built
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"grad_normalised": torch.zeros(2, 5)}, "grad_normalised and stream must have the same shape"),
        ({"grad_normalised": torch.zeros(3, 5).bfloat16()}, "grad_normalised and stream must have the same dtype"),
        ({"grad_normalised": torch.zeros(5, 3).t()}, "grad_normalised must be contiguous"),
        ({"grad_stream": torch.zeros(3, 4)}, "grad_stream and stream must have the same shape"),
        ({"stream": torch.zeros(3, 5).double()}, "dtype must be float32 or bfloat16"),
        ({"weight": torch.zeros(6)}, "weight has a wrong shape"),
        ({"mean": torch.zeros(4)}, "mean has a wrong shape"),
        ({"rstd": torch.zeros(3).bfloat16()}, "rstd must be float32"),
    ],
)
def test_gradients_that_do_not_fit_are_refused(changed: dict[str, torch.Tensor], message: str) -> None:
    given = dict.fromkeys(("grad_normalised", "grad_stream", "stream"), torch.zeros(3, 5))
    given |= {"weight": torch.ones(5), "mean": torch.zeros(3), "rstd": torch.ones(3), **changed}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.headrace.layer_norm_backward(**given)


@built
def test_expanded_gradients_and_no_second_derivative() -> None:
    inputs, _ = random_inputs(6, (3, 8), torch.float32)
    x, *rest = (None if each is None else each.requires_grad_() for each in inputs.values())
    normed = residual_norm.fused(x, *rest)  # type: ignore[arg-type]
    (normed.normalised.sum() + normed.stream.sum()).backward()  # expanded gradients, of stride 0
    assert x is not None
    ones = torch.ones(3, 8)
    torch.testing.assert_close(x.grad, everything(residual_norm.reference, inputs, [ones, ones])["grad of x"])
    total = residual_norm.fused(x, *rest).normalised.square().sum()  # type: ignore[arg-type]
    (grad,) = torch.autograd.grad(total, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


@built
@dtypes
@kinds
@pytest.mark.parametrize("shape", [(5, 3, 14), (0, 6)])
def test_torch_finds_the_operators_sound(
    shape: tuple[int, ...], residual: bool, layer_norm: bool, dtype: torch.dtype
) -> None:
    inputs, grads = random_inputs(0, shape, dtype, None, residual, layer_norm)
    given = [each.requires_grad_() for each in inputs.values() if each is not None]
    kind = "layer_norm" if layer_norm else "rms_norm"
    forward = getattr(torch.ops.headrace, f"residual_{kind}_forward" if residual else f"{kind}_forward")
    torch.library.opcheck(forward, (*given, 1e-5))
    _, *rest = forward(*(each.detach() for each in given), 1e-5)
    stream = rest.pop(0) if residual else given[0].detach()
    skipped = grads[1] if residual else None
    backward = getattr(torch.ops.headrace, f"{kind}_backward")
    torch.library.opcheck(backward, (grads[0], skipped, stream, given[1 + residual].detach(), *rest[:-1]))


@built
@kinds
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic: bool, residual: bool, layer_norm: bool) -> None:
    def form(*inputs: Any) -> Any:
        return residual_norm.fused(*inputs)[:2]

    torch._dynamo.reset()  # or the other cases count as recompilations of this one
    compiled = torch.compile(form, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 5):
        inputs, grads = random_inputs(rows, (rows, 2, 12), torch.float32, None, residual, layer_norm)
        mine, eager = everything(compiled, inputs, grads), everything(residual_norm.fused, inputs, grads)
        assert all(torch.equal(mine[name], eager[name]) for name in eager)


@kinds
def test_reference_is_right_in_float64(residual: bool, layer_norm: bool) -> None:
    inputs, _ = random_inputs(1, (4, 6), torch.float64, None, residual, layer_norm)
    leaves = tuple(None if each is None else each.requires_grad_() for each in inputs.values())
    assert torch.autograd.gradcheck(residual_norm.reference, leaves)
    x, added, weight, bias = (None if each is None else each.detach() for each in leaves)
    assert x is not None
    assert weight is not None
    normalised, stream = residual_norm.reference(x, added, weight, bias, 1e-3)
    assert torch.equal(stream, x if added is None else x + added)
    centred = stream - stream.mean(-1, keepdim=True) if layer_norm else stream
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight
    torch.testing.assert_close(normalised, expected if bias is None else expected + bias)


@built
def test_the_choice_says_why() -> None:
    assert choice.choose(residual_norm.KERNEL, "auto", "cpu") == ("fused", "faster than torch on cpu")
    assert choice.available("cpu")["residual_norm"] == "fused: faster than torch on cpu"
    assert choice.available("cuda")["residual_norm"].startswith("torch: ")
