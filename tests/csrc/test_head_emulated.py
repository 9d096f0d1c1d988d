"""The head's CUDA kernels on the emulator: the same bits under every schedule, right by float64, no write beside."""

import emulated
import pytest
import torch

from parallel.kernels import head

pytestmark = emulated.needs_emulator
SOURCES = 2
INF, NAN = float("inf"), float("nan")
Loss = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def kernels() -> emulated.Emulated:
    return emulated.load("head")


def random_case(rows: int, columns: int, dtype: torch.dtype, offset: int = 0) -> tuple[torch.Tensor, ...]:
    """(logits, labels, weights, sources); row 0 has two equal maxima, the last is ignored, the one before weighs 0."""
    generator = torch.Generator().manual_seed(rows * columns)
    logits = emulated.guarded((rows, columns), dtype, offset)
    logits.copy_(torch.randn(logits.shape, generator=generator) * 4)
    labels = torch.randint(0, columns, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator)
    if rows > 2:
        logits[0, [columns // 3, columns - 1]] = 20.0
        labels[0] = columns // 3
        labels[-1], weights[-2] = head.IGNORE_INDEX, 0.0
    return logits, labels, weights, torch.randint(0, SOURCES, (rows,), generator=generator)


def whole(kernels: emulated.Emulated, case: tuple[torch.Tensor, ...], z_loss: float, max_z_loss: float) -> Loss:
    """(losses, gradient of the logits, counters) by one kernel."""
    before, counters = case[0].clone(), torch.zeros(SOURCES, 5, dtype=torch.int64)
    losses = kernels.ops.head_chunk_(
        *case, counters, z_loss, max_z_loss, float(head.LOSS_UNIT), head.IGNORE_INDEX, True
    )
    emulated.check_canaries(case[0])
    gradient = case[0].clone()
    case[0].copy_(before)
    return losses, gradient, counters


def split(kernels: emulated.Emulated, case: tuple[torch.Tensor, ...], ranks: int, z_loss: float) -> Loss:
    """The same by the statistics of each rank's columns and the gradients of these."""
    columns, ignore = case[0].size(1) // ranks, head.IGNORE_INDEX
    pieces, found = [piece.contiguous() for piece in case[0].clone().chunk(ranks, dim=1)], []
    gathered = torch.stack(
        [
            kernels.ops.head_statistics(piece, case[1], rank * columns, ranks, head.parts(ranks), ignore)
            for rank, piece in enumerate(pieces)
        ]
    )
    for rank, piece in enumerate(pieces):
        counters = torch.zeros(SOURCES, 5, dtype=torch.int64)
        how = (rank * columns, z_loss, z_loss, float(head.LOSS_UNIT), ignore, True)
        losses = kernels.ops.head_gradient_(piece, gathered, *case[1:], counters, *how)
        found.append((losses, counters))
    assert all(torch.equal(losses[:2], found[0][0][:2]) for losses, _ in found)
    assert all(torch.equal(counters, found[0][1]) for _, counters in found)
    return found[0][0], torch.cat(pieces, dim=1), found[0][1]


def check_against_float64(case: tuple[torch.Tensor, ...], found: Loss, z_loss: float, max_z_loss: float) -> None:
    true, true_gradient, true_counters = head.reference(
        case[0].double(), *case[1:], SOURCES, z_loss=z_loss, max_z_loss=max_z_loss
    )
    losses, gradient, counters = found
    for mine, expected in zip(losses[:2], true, strict=False):
        torch.testing.assert_close(mine.double(), expected, rtol=1e-6, atol=2e-6)
    relative = 4e-6 if gradient.dtype == torch.float32 else 2**-8
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=relative, atol=1e-6)
    assert torch.equal(counters[:, [0, 3, 4]], true_counters[:, [0, 3, 4]])
    off = (counters - true_counters).abs().sum(0)
    assert int(off[1]) <= 2e-6 * 40 * len(case[0]) * head.LOSS_UNIT


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "not aligned"])
@pytest.mark.parametrize("dtype", head.DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (4, 128), (3, 1000), (2, 4104), (0, 16)])
def test_agrees_with_float64(
    kernels: emulated.Emulated, rows: int, columns: int, dtype: torch.dtype, offset: int
) -> None:
    case = random_case(rows, columns, dtype, offset)
    for z_loss, max_z_loss in ((0.0, 0.0), (1e-2, 2e-2)):
        found = emulated.under_every_schedule(kernels, lambda: whole(kernels, case, z_loss, max_z_loss), seeds=1)  # noqa: B023
        check_against_float64(case, found, z_loss, max_z_loss)


@pytest.mark.parametrize("dtype", head.DTYPES)
def test_agrees_with_float64_on_a_large_vocabulary(kernels: emulated.Emulated, dtype: torch.dtype) -> None:
    case = random_case(3, 139_776, dtype)
    found = whole(kernels, case, 1e-2, 1e-2)
    with kernels.schedule("greedy_reverse"):
        again = whole(kernels, case, 1e-2, 1e-2)
    for one, other in zip(found, again, strict=True):
        assert torch.equal(one, other)
    check_against_float64(case, found, 1e-2, 1e-2)


@pytest.mark.parametrize("dtype", head.DTYPES)
@pytest.mark.parametrize("ranks", [2, 16])
def test_how_the_vocabulary_is_split_changes_no_bit(kernels: emulated.Emulated, ranks: int, dtype: torch.dtype) -> None:
    case = random_case(4, 2048, dtype)
    losses, gradient, counters = whole(kernels, case, 1e-2, 1e-2)
    found = emulated.under_every_schedule(kernels, lambda: split(kernels, case, ranks, 1e-2), seeds=1)
    assert torch.equal(found[0][:2], losses[:2])
    assert torch.equal(found[1], gradient)
    assert torch.equal(found[2], counters)


@pytest.mark.parametrize("dtype", head.DTYPES)
def test_infinities_and_nan_go_where_torch_sends_them(kernels: emulated.Emulated, dtype: torch.dtype) -> None:
    case = random_case(7, 640, dtype)
    logits, labels = case[:2]
    case[2].fill_(1.0)
    labels[3], labels[6] = 5, head.IGNORE_INDEX
    logits[0, 600], logits[1, 3], logits[2, :80], logits[3, 5], logits[4], logits[6] = NAN, INF, -INF, -INF, -INF, NAN
    labels[2] = 300
    losses, gradient, counters = whole(kernels, case, 1e-2, 0.0)
    true, true_gradient, true_counters = head.reference(logits.float(), *case[1:], SOURCES, z_loss=1e-2)
    assert torch.equal(losses[0].isnan(), true.reported.isnan())
    assert torch.equal(losses[0].isinf(), true.reported.isinf())
    assert torch.equal(gradient.isnan(), true_gradient.isnan())
    assert torch.equal(counters[:, [0, 4]], true_counters[:, [0, 4]])
