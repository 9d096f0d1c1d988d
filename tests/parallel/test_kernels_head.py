"""The fused head's operators against float64, and counters that nothing but the losses can change."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.kernels import extension, head

pytestmark = pytest.mark.skipif(bool(extension.problem()), reason=f"kernels: {extension.problem()}")

COEFFICIENTS = [(0.0, 0.0), (1e-2, 0.0), (0.0, 1e-2), (3e-2, 2e-2)]
SOURCES = 3
INF, NAN = float("inf"), float("nan")
Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def random_case(rows: int, columns: int, dtype: torch.dtype, seed: int = 0, ignored: bool = True) -> Case:
    """(logits, labels, weights, sources); a fifth of the labels ignored, a fifth of the weights 0."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, columns, generator=generator) * 4).to(dtype)
    labels = torch.randint(0, columns, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator) * 2
    if ignored:
        labels[torch.rand(rows, generator=generator) < 0.2] = head.IGNORE_INDEX
        weights[torch.rand(rows, generator=generator) < 0.2] = 0.0
    return logits, labels, weights, torch.randint(0, SOURCES, (rows,), generator=generator)


def fused(case: Case, **options: Any) -> tuple[head.Losses, torch.Tensor, torch.Tensor]:
    """As `head.reference`: (losses, gradient of the logits, counters)."""
    logits, counters = case[0].clone(), torch.zeros(SOURCES, 5, dtype=torch.int64)
    return head.fused_(logits, *case[1:], counters, **options), logits, counters


def split(case: Case, ranks: int, **options: Any) -> tuple[head.Losses, torch.Tensor, torch.Tensor]:
    """`fused`, by `ranks` that have a part of the columns each; the counters are those of the last one."""
    pieces = [piece.clone(memory_format=torch.contiguous_format) for piece in case[0].chunk(ranks, dim=1)]
    gathered = torch.stack([head.statistics(piece, case[1], rank, ranks) for rank, piece in enumerate(pieces)])
    found = []
    for rank, piece in enumerate(pieces):
        counters = torch.zeros(SOURCES, 5, dtype=torch.int64)
        found.append((head.gradient_(piece, gathered, *case[1:], counters, rank, **options), counters))
    for losses, counters in found:
        torch.testing.assert_close(losses.reported, found[0][0].reported, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(counters, found[0][1])
    sums = torch.stack([losses.logit_sums for losses, _ in found]).sum(0)
    return found[-1][0]._replace(logit_sums=sums), torch.cat(pieces, dim=1), found[-1][1]


def check_against_float64(case: Case, form: Callable[..., Any] = fused, **options: Any) -> None:
    losses, gradient, counters = form(case, **options)
    true, true_gradient, true_counters = head.reference(case[0].double(), *case[1:], SOURCES, **options)
    for mine, expected in zip(losses, true, strict=True):
        scale = 1.0 + float(expected.abs().max()) if expected.numel() else 1.0
        torch.testing.assert_close(mine.double(), expected, rtol=1e-6, atol=1e-6 * scale)
    relative = 4e-6 if gradient.dtype == torch.float32 else 2**-8  # of a probability; the label's is a difference
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=relative, atol=1e-6)
    assert torch.equal(counters[:, [0, 3, 4]], true_counters[:, [0, 3, 4]])
    for column, unit in ((1, head.LOSS_UNIT), (2, head.Z_UNIT)):
        sums, expected = counters[:, column] / unit, true_counters[:, column] / unit
        torch.testing.assert_close(sums, expected, rtol=2e-6, atol=2e-6 * len(case[0]))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 7),
    columns=st.one_of(st.integers(1, 70), st.integers(250, 1300)),
    dtype=st.sampled_from(head.DTYPES),
    coefficients=st.sampled_from(COEFFICIENTS),
    seed=st.integers(0, 2**31),
)
def test_agrees_with_float64(
    rows: int, columns: int, dtype: torch.dtype, coefficients: tuple[float, float], seed: int
) -> None:
    z_loss, max_z_loss = coefficients
    check_against_float64(random_case(rows, columns, dtype, seed), z_loss=z_loss, max_z_loss=max_z_loss)


@pytest.mark.parametrize("dtype", head.DTYPES)
@pytest.mark.parametrize(("z_loss", "max_z_loss"), COEFFICIENTS)
def test_agrees_with_float64_on_a_large_vocabulary(z_loss: float, max_z_loss: float, dtype: torch.dtype) -> None:
    case = random_case(3, 139_776, dtype, seed=1, ignored=False)
    check_against_float64(case, z_loss=z_loss, max_z_loss=max_z_loss)


@settings(max_examples=30, deadline=None)
@given(
    ranks=st.sampled_from([1, 2, 3, 4, 8, 16, 32]),
    columns=st.integers(1, 40),
    dtype=st.sampled_from(head.DTYPES),
    coefficients=st.sampled_from(COEFFICIENTS),
    seed=st.integers(0, 2**31),
)
def test_a_split_vocabulary_agrees_with_float64(
    ranks: int, columns: int, dtype: torch.dtype, coefficients: tuple[float, float], seed: int
) -> None:
    case = random_case(4, ranks * columns, dtype, seed)
    z_loss, max_z_loss = coefficients
    check_against_float64(case, lambda *a, **b: split(*a, ranks, **b), z_loss=z_loss, max_z_loss=max_z_loss)


@pytest.mark.parametrize("dtype", head.DTYPES)
@pytest.mark.parametrize("columns", [128, 32_000, 139_776])
def test_how_the_vocabulary_is_split_changes_no_bit(columns: int, dtype: torch.dtype) -> None:
    """Of losses and counters, where it is a multiple of 128; the gradient of fp32 is made in other steps."""
    case = random_case(5, columns, dtype, seed=2)
    case[0][0, [3, columns // 2 + 5]] = 30.0  # ranks tie for the maximum: the first column's is the subgradient
    options = {"z_loss": 1e-2, "max_z_loss": 1e-2}
    losses, gradient, counters = fused(case, **options)
    for ranks in (1, 2, 4, 8, 16):
        again, split_gradient, split_counters = split(case, ranks, **options)
        assert torch.equal(split_counters, counters)
        assert torch.equal(again.reported, losses.reported)
        assert torch.equal(again.minimised, losses.minimised)
        torch.testing.assert_close(split_gradient, gradient, rtol=1e-6 if dtype == torch.float32 else 2**-8, atol=1e-9)


@pytest.mark.parametrize("dtype", head.DTYPES)
def test_counters_and_losses_do_not_depend_on_chunks_order_and_threads(dtype: torch.dtype) -> None:
    case = random_case(97, 1300, dtype, seed=3)
    options = {"z_loss": 1e-2, "max_z_loss": 1e-2}
    losses, gradient, counters = fused(case, **options)
    order = torch.randperm(97, generator=torch.Generator().manual_seed(1))
    total = torch.zeros_like(counters)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for begin, end in ((0, 40), (40, 41), (41, 97)):
            rows = order[begin:end]
            again, chunk_gradient, chunk_counters = fused(tuple(each[rows] for each in case), **options)
            total += chunk_counters
            assert torch.equal(chunk_gradient, gradient[rows])
            for mine, whole in zip(again, losses, strict=True):
                assert torch.equal(mine, whole[rows])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(total, counters)


def test_counters_are_the_losses_in_fixed_point() -> None:
    case = random_case(50, 77, torch.float32, seed=4)
    losses, _, counters = fused(case, z_loss=1e-2, loss_unit=2**20)
    counted = case[1] != head.IGNORE_INDEX
    for source in range(SOURCES):
        rows = counted & (case[3] == source)
        fixed = (losses.reported[rows].double() * 2**20).round().long().sum()
        assert counters[source].tolist() == [int(rows.sum()), int(fixed), *counters[source, 2:].tolist()]
    assert torch.equal(fused(case, z_loss=1e-2, loss_unit=2**20, gradient=False)[2], counters)


@pytest.mark.parametrize("form", [fused, lambda case, **options: split(case, 2, **options)], ids=["whole", "split"])
@pytest.mark.parametrize("dtype", head.DTYPES)
def test_of_equal_maxima_the_first_takes_the_subgradient(dtype: torch.dtype, form: Callable[..., Any]) -> None:
    logits = torch.zeros(3, 24, dtype=dtype)
    logits[0, [7, 20]], logits[1, [20, 23]], logits[2, 5] = 2.0, 2.0, -1.0
    case = (logits, torch.tensor([20, 20, 0]), torch.ones(3), torch.zeros(3, dtype=torch.int64))
    plain, found = (form(case, max_z_loss=each)[1].double() for each in (0.0, 0.5))
    where = [[0, 7], [1, 20]]  # row 2's maximum is 0, and so is its gradient
    expected = torch.zeros(3, 24, dtype=torch.float64)
    expected[[row for row, _ in where], [column for _, column in where]] = 2.0
    torch.testing.assert_close(found - plain, expected, rtol=0, atol=1e-2 if dtype == torch.bfloat16 else 1e-6)
    assert form(case)[2][0, 3] == 2  # rows 1 and 2 are right, row 0's label comes second


@pytest.mark.parametrize("dtype", head.DTYPES)
def test_rows_that_are_ignored_are_zero_whatever_they_hold(dtype: torch.dtype) -> None:
    case = random_case(4, 300, dtype, ignored=False)
    case[0][0, 3], case[0][1, 4], case[0][2] = NAN, INF, -INF
    case[1][:] = head.IGNORE_INDEX
    losses, gradient, counters = fused(case, z_loss=1.0, max_z_loss=1.0)
    assert not losses.reported.any()
    assert not losses.minimised.any()
    assert not gradient.any()
    assert not counters.any()
    logits = case[0].clone()
    head.fused_(logits, *case[1:], counters, gradient=False)
    assert torch.equal(logits.view(torch.uint8), case[0].view(torch.uint8))  # left as they are


@pytest.mark.parametrize("form", [fused, lambda case, **options: split(case, 4, **options)], ids=["whole", "split"])
@pytest.mark.parametrize("dtype", head.DTYPES)
def test_infinities_and_nan_go_where_torch_sends_them(dtype: torch.dtype, form: Callable[..., Any]) -> None:
    case = random_case(8, 640, dtype, ignored=False)
    logits, labels = case[:2]
    logits[0, 600], logits[1, 3], logits[2, 9], logits[3, labels[3]] = NAN, INF, -INF, -INF
    logits[4], logits[5, :80], logits[6, ::2] = -INF, -INF, NAN
    labels[5] = 200
    losses, gradient, counters = form(case, z_loss=1e-2)
    true, true_gradient, true_counters = head.reference(logits.float(), *case[1:], SOURCES, z_loss=1e-2)
    assert torch.equal(losses.reported.isnan(), true.reported.isnan())
    assert torch.equal(losses.reported.isinf(), true.reported.isinf())
    assert torch.equal(losses.minimised.isfinite(), true.minimised.isfinite())
    assert torch.equal(gradient.isnan(), true_gradient.isnan())
    assert torch.equal(counters[:, [0, 4]], true_counters[:, [0, 4]])
    assert int(counters[:, 4].sum()) == 5


def test_labels_and_sources_that_are_not_there_are_not_passed_over() -> None:
    case = random_case(4, 32, torch.float32, ignored=False)
    case[1][0], case[1][1], case[3][2] = 32, -1, SOURCES
    losses, _, counters = fused(case)
    assert losses.reported.isnan().tolist() == [True, True, True, False]
    assert int(counters[:, 0].sum()) == 3
    assert int(counters[:, 4].sum()) == 2


def changed(at: int, to: torch.Tensor) -> list[torch.Tensor]:
    case = [*random_case(4, 16, torch.float32), torch.zeros(SOURCES, 5, dtype=torch.int64)]
    case[at] = to
    return case


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        (changed(0, torch.zeros(4, 16, dtype=torch.float16)), TypeError, "logits are torch.float16"),
        (changed(0, torch.zeros(4, 16, dtype=torch.float64)), TypeError, "it takes torch.float32 and torch.bfloat16"),
        (changed(0, torch.zeros(64)), ValueError, "logits have shape [64]"),
        (changed(0, torch.zeros(4, 0)), ValueError, "1 to 2^24 columns"),
        (changed(0, torch.zeros(16, 4).t()), ValueError, "have strides [1, 4]; call .contiguous()"),
        (changed(1, torch.zeros(4, dtype=torch.int32)), TypeError, "labels are torch.int32; it takes torch.int64"),
        (changed(1, torch.zeros(3, dtype=torch.int64)), ValueError, "labels have shape [3], not [4]"),
        (changed(2, torch.zeros(4, dtype=torch.float64)), TypeError, "weights are torch.float64"),
        (changed(3, torch.zeros(8, dtype=torch.int64)[::2]), ValueError, "sources of shape [4] have strides [2]"),
        (changed(4, torch.zeros(SOURCES, 4, dtype=torch.int64)), ValueError, "counters have shape [3, 4], not [3, 5]"),
        (changed(4, torch.zeros(5, dtype=torch.int64)), ValueError, "counters have shape [5]"),
    ],
)
def test_what_it_does_not_take_is_refused(tensors: list[torch.Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        head.fused_(*tensors)
    assert message in str(raised.value)
    with pytest.raises(RuntimeError, match="headrace::head_chunk_: "):  # the operator itself checks again
        torch.ops.headrace.head_chunk_(*tensors, 0.0, 0.0, 1.0, -100, True)


def test_more_ranks_than_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="split over 33 ranks; it takes 32 at most"):
        head.statistics(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), 0, 33)
    with pytest.raises(RuntimeError, match="gathered must be"):
        torch.ops.headrace.head_gradient_(
            *(torch.zeros(2, 4), torch.zeros(2, 2)), *changed(1, torch.zeros(2))[1:], 0, 0.0, 0.0, 1.0, -100, True
        )


@pytest.mark.parametrize("dtype", head.DTYPES)
@pytest.mark.parametrize("rows", [0, 3])
def test_torch_finds_the_operators_sound(rows: int, dtype: torch.dtype) -> None:
    logits, labels, weights, sources = random_case(rows, 32, dtype)
    rest, counters = (labels, weights, sources), torch.zeros(SOURCES, 5, dtype=torch.int64)
    statistics = head.statistics(logits, labels, 0, 2)
    gathered = torch.stack([statistics, statistics])
    torch.library.opcheck(torch.ops.headrace.head_chunk_, (logits, *rest, counters, 0.1, 0.1, 1.0, -100, True))
    torch.library.opcheck(torch.ops.headrace.head_statistics, (logits, labels, 0, 2, 8, -100))
    torch.library.opcheck(
        torch.ops.headrace.head_gradient_, (logits, gathered, *rest, counters, 0, 0.1, 0.1, 1.0, -100, True)
    )


def test_compiles_into_one_graph() -> None:
    case = random_case(5, 48, torch.float32)

    def doubled(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits, counters = tensors[0] * 2.0, torch.zeros(SOURCES, 5, dtype=torch.int64)
        losses = head.fused_(logits, *tensors[1:], counters, z_loss=0.1)
        return losses.minimised, logits, counters

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    for mine, eager in zip(compiled(*case), doubled(*case), strict=True):
        assert torch.equal(mine, eager)


def test_the_reference_is_right_in_float64() -> None:
    logits, labels, weights, sources = random_case(6, 20, torch.float64)
    leaf = logits.clone().requires_grad_()
    log_z, counted = leaf.logsumexp(1), labels != head.IGNORE_INDEX
    reported = torch.nn.functional.cross_entropy(leaf, labels, reduction="none", ignore_index=head.IGNORE_INDEX)
    minimised = reported + (0.1 * log_z**2 + 0.2 * leaf.max(1)[0] ** 2) * counted
    (minimised * weights).sum().backward()
    losses, gradient, _ = head.reference(logits, labels, weights, sources, SOURCES, z_loss=0.1, max_z_loss=0.2)
    torch.testing.assert_close(losses.reported, reported.detach())
    torch.testing.assert_close(losses.minimised, minimised.detach())
    torch.testing.assert_close(gradient, leaf.grad)
