"""Fused gradient of an embedding against float64, and everything torch asks of an operator."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_checks import INF, NAN, assert_same_specials, with_threads

from parallel.kernels import embedding, extension

built = pytest.mark.skipif(bool(extension.problem()), reason=f"kernels: {extension.problem()}")
dtypes = pytest.mark.parametrize("dtype", embedding.DTYPES)
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def random_inputs(
    seed: int, shape: tuple[int, ...], rows: int, width: int, dtype: torch.dtype, reach: int | None = None
) -> Inputs:
    """Tokens of `shape`, some far more frequent than others, a table of `rows` and a gradient of what is looked up;
    `reach`: tokens are below it instead of below `rows`."""
    generator = torch.Generator().manual_seed(seed)
    tokens = (torch.rand(shape, generator=generator) ** 4 * (rows if reach is None else reach)).long()
    weight = torch.randn((rows, width), generator=generator).to(dtype)
    return tokens, weight, torch.randn((*shape, width), generator=generator).to(dtype)


def run(form: Any, inputs: Inputs, first: int | None = None) -> list[torch.Tensor]:
    """[what is looked up, the table's gradient]."""
    tokens, weight, grad = inputs
    weight = weight.clone().requires_grad_()
    found = form(tokens, weight, first)
    found.backward(grad)
    assert weight.grad is not None
    return [found.detach(), weight.grad]


def check_against_float64(inputs: Inputs, first: int | None = None) -> None:
    tokens, weight, grad = inputs
    found, gradient = run(embedding.fused, inputs, first)
    true_found, true = run(embedding.reference, (tokens, weight.double(), grad.double()), first)
    sizes = run(embedding.reference, (tokens, weight.double(), grad.double().abs()), first)[1]
    assert torch.equal(found.double(), true_found)
    assert gradient.dtype == weight.dtype
    rounding = 2**-8 if weight.dtype == torch.bfloat16 else 2**-23
    assert bool(((gradient.double() - true).abs() <= rounding * true.abs() + 1e-6 * sizes).all())
    total = torch.full(weight.shape, 0.25)
    table = weight.clone().requires_grad_()
    embedding.fused(tokens, table, first, total).backward(grad)
    assert table.grad is None
    # A sum in fp32 of bf16 gradients is exact to fp32: it was not rounded to bf16 in between.
    assert bool(((total.double() - 0.25 - true).abs() <= 1e-6 * sizes + 1e-7).all())


@built
@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 40), min_size=1, max_size=2),
    rows=st.integers(1, 50),
    width=st.integers(0, 300),
    first=st.none() | st.integers(0, 60),
    dtype=st.sampled_from(embedding.DTYPES),
    seed=st.integers(0, 2**31),
)
def test_agrees_with_float64(
    shape: list[int], rows: int, width: int, first: int | None, dtype: torch.dtype, seed: int
) -> None:
    reach = rows if first is None else 2 * rows + 40  # a rank's part: tokens before it, in it and behind it
    check_against_float64(random_inputs(seed, tuple(shape), rows, width, dtype, reach), first)


@built
@dtypes
@pytest.mark.parametrize("lengths", [[63], [64], [65], [200, 1, 65, 64, 129], [1] * 70])
def test_runs_of_every_length_are_summed(lengths: list[int], dtype: torch.dtype) -> None:
    """Runs that end before, at and behind the end of a segment of 64, with their places in any order."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    tokens = tokens[torch.randperm(len(tokens), generator=generator)]
    grad = torch.randn((len(tokens), 37), generator=generator).to(dtype)
    check_against_float64((tokens, torch.zeros(len(lengths) + 3, 37, dtype=dtype), grad))


@built
@dtypes
def test_a_vocabulary_of_139776_rows(dtype: torch.dtype) -> None:
    check_against_float64(random_inputs(5, (2, 300), 139_776, 24, dtype))


@built
def test_tables_of_ranks_are_parts_of_the_whole() -> None:
    tokens, weight, grad = random_inputs(1, (500,), 64, 40, torch.float32)
    found, gradient = run(embedding.fused, (tokens, weight, grad))
    parts = [run(embedding.fused, (tokens, part, grad), first) for first, part in ((0, weight[:24]), (24, weight[24:]))]
    assert torch.equal(parts[0][0] + parts[1][0], found)
    assert torch.equal(torch.cat([part[1] for part in parts]), gradient)


@built
@dtypes
def test_the_same_bits_whatever_the_threads(dtype: torch.dtype) -> None:
    inputs = random_inputs(2, (3000,), 200, 90, dtype)
    one, three = (with_threads(count, lambda: run(embedding.fused, inputs)) for count in (1, 3))
    assert torch.equal(one[1], three[1])
    assert int((one[1] != 0).any(-1).sum()) == len(inputs[0].unique())


@built
@dtypes
def test_infinities_and_nan_stay_in_their_rows(dtype: torch.dtype) -> None:
    tokens = torch.tensor([0, 1, 2, 3, 2, 3, 4])
    grad = torch.tensor([[NAN], [INF], [INF], [INF], [-INF], [1.0], [2.0]], dtype=dtype)
    inputs = (tokens, torch.zeros(6, 1, dtype=dtype), grad)
    assert_same_specials(*(run(form, inputs) for form in (embedding.fused, embedding.reference)))


@built
def test_expanded_gradients_and_no_second_derivative() -> None:
    tokens, weight, _ = random_inputs(3, (4, 5), 7, 6, torch.float32)
    weight = weight.requires_grad_()
    (gradient,) = torch.autograd.grad(embedding.fused(tokens, weight).sum(), weight, create_graph=True)
    counts = torch.bincount(tokens.reshape(-1), minlength=7).float()
    assert torch.equal(gradient, counts[:, None].expand(7, 6))
    (gradient,) = torch.autograd.grad(embedding.fused(tokens, weight).square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


@built
def test_a_frozen_table_gets_nothing() -> None:
    tokens, weight, grad = random_inputs(3, (4,), 7, 6, torch.float32)
    total = torch.zeros(7, 6)
    more = torch.ones(1, requires_grad=True)
    (embedding.fused(tokens, weight, None, total) * more).backward(grad)
    assert not total.any()


@built
@pytest.mark.parametrize(
    ("tokens", "weight", "total", "error", "message"),
    [
        (torch.zeros(3).int(), torch.zeros(4, 2), None, TypeError, "tokens are torch.int32; it takes torch.int64"),
        (torch.zeros(3).long(), torch.zeros(4, 2).double(), None, TypeError, "weight is torch.float64"),
        (torch.zeros(3).long(), torch.zeros(4), None, ValueError, "weight has shape [4]; it must be [rows, width]"),
        (torch.zeros(3).long(), torch.zeros(4, 2, device="meta"), None, ValueError, "weight is on meta, tokens on cpu"),
        (torch.zeros(3).long(), torch.zeros(4, 2), torch.zeros(4, 2).bfloat16(), TypeError, "total is torch.bfloat16"),
        (torch.zeros(3).long(), torch.zeros(4, 2), torch.zeros(2, 4).t(), ValueError, "total must be contiguous"),
        (
            torch.zeros(3).long(),
            torch.zeros(4, 2),
            torch.zeros(5, 2),
            ValueError,
            "total is [5, 2] on cpu, weight [4, 2]",
        ),
        (torch.tensor([4]), torch.zeros(4, 2), None, IndexError, "index out of range"),
    ],
)
def test_what_it_does_not_take_is_refused(
    tokens: torch.Tensor, weight: torch.Tensor, total: torch.Tensor | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as raised:
        embedding.fused(tokens, weight, None, total)
    assert message in str(raised.value)


@built
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grad": torch.zeros(3)}, "grad must have two dimensions"),
        ({"grad": torch.zeros(3, 2).double()}, "dtype must be float32 or bfloat16"),
        ({"grad": torch.zeros(2, 3).t()}, "grad must be contiguous"),
        ({"tokens": torch.zeros(3).int()}, "tokens must be int64"),
        ({"tokens": torch.zeros(4).long()}, "tokens has a wrong shape"),
        ({"tokens": torch.tensor([1, 0, 2])}, "tokens must be in rising order"),
        ({"order": torch.tensor([0, 1, 3])}, "order must be places in grad"),
        ({"order": torch.tensor([0, -1, 2])}, "order must be places in grad"),
        ({"order": torch.zeros(2).long()}, "order has a wrong shape"),
        ({"table": torch.zeros(4, 3)}, "table must have rows as long as grad's"),
        ({"table": torch.zeros(4, 2).bfloat16()}, "table must be float32"),
        ({"table": torch.zeros(2, 4).t()}, "table must be contiguous"),
    ],
)
def test_the_operators_check_again(changes: dict[str, torch.Tensor], message: str) -> None:
    inputs = {"grad": torch.zeros(3, 2), "tokens": torch.arange(3), "order": torch.arange(3)} | changes
    table = inputs.pop("table", torch.zeros(4, 2))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.headrace.embedding_gradient_add_(table, *inputs.values())
    if "table" not in changes:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.headrace.embedding_gradient(*inputs.values(), 4)
        with pytest.raises(RuntimeError, match="rows must not be negative"):
            torch.ops.headrace.embedding_gradient(torch.zeros(3, 2), torch.arange(3), torch.arange(3), -1)


@built
@dtypes
@pytest.mark.parametrize("places", [9, 0])
def test_torch_finds_the_operators_sound(places: int, dtype: torch.dtype) -> None:
    tokens, _, grad = random_inputs(0, (places,), 5, 6, dtype)
    ordered, order = tokens.sort(stable=True)
    torch.library.opcheck(torch.ops.headrace.embedding_gradient, (grad, ordered, order, 5))
    torch.library.opcheck(torch.ops.headrace.embedding_gradient_add_, (torch.zeros(5, 6), grad, ordered, order))


@built
@pytest.mark.parametrize("first", [None, 3])
def test_compiles_into_one_graph(first: int | None) -> None:
    compiled = torch.compile(embedding.fused, fullgraph=True, backend="aot_eager")
    inputs = random_inputs(4, (2, 9), 5, 12, torch.float32, None if first is None else 12)
    pairs = zip(run(compiled, inputs, first), run(embedding.fused, inputs, first), strict=True)
    assert all(torch.equal(mine, eager) for mine, eager in pairs)


def test_reference_is_right_in_float64() -> None:
    tokens, weight, _ = random_inputs(1, (4, 3), 5, 6, torch.float64, 9)
    assert torch.autograd.gradcheck(lambda table: embedding.reference(tokens, table, 2), (weight.requires_grad_(),))
