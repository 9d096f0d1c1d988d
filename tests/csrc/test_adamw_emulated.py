"""AdamW's CUDA kernels on the emulator: under every schedule the bits of the CPU's kernel, nothing written beside."""

import emulated
import pytest
import torch
from adamw_cases import FORMS, Case, case

from parallel.kernels import adamw, extension

pytestmark = [
    emulated.needs_emulator,
    pytest.mark.skipif(bool(extension.problem()), reason=f"kernels: {extension.problem()}"),
]
DTYPES = (torch.float32, torch.bfloat16)
# a chunk and a bit, vectors and ends of them, one number, none
SIZES = [16_384 + 8 * 70 + 3, 8, 1, 0, 2061, 264]


@pytest.fixture(scope="module")
def kernels() -> emulated.Emulated:
    return emulated.load("adamw")


def guarded(start: Case, offset: int) -> Case:
    """The same numbers between canaries, `offset` numbers past a 16-byte boundary."""
    copy = start.copy()
    for name in ("weights", "gradients", "exp_avgs", "exp_avg_sqs", "lows"):
        for number, tensor in enumerate(getattr(copy, name)):
            getattr(copy, name)[number] = emulated.guarded(tuple(tensor.shape), tensor.dtype, offset).copy_(tensor)
    return copy


def call(operator: object, each: Case, norm: float, sums: bool) -> torch.Tensor:
    settings = torch.tensor([group[1:] for group in each.groups], dtype=torch.float64)
    lists = [each.weights, each.lows, each.gradients, each.exp_avgs, each.exp_avg_sqs]
    sizes = [group.tensors for group in each.groups]
    grad_norm = torch.tensor([norm], dtype=torch.float64)
    result: torch.Tensor = operator(*lists, settings, sizes, each.bases, grad_norm, 1.0, 2**40 + 1, sums)  # type: ignore[operator]
    return result


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "not aligned"])
@pytest.mark.parametrize("gradient", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_has_the_bits_of_the_cpu(kernels: emulated.Emulated, form: str, gradient: torch.dtype, offset: int) -> None:
    start = case(form, SIZES, gradient)
    made: list[Case] = []

    def run() -> list[torch.Tensor]:
        made.append(guarded(start, offset))
        sums = call(kernels.ops.adamw_, made[-1], 3.0, sums=True)
        return [*made[-1].changed, sums]

    *changed, sums = emulated.under_every_schedule(kernels, run, seeds=1)
    cpu = start.copy()
    cpu_sums = call(torch.ops.headrace.adamw_, cpu, 3.0, sums=True)
    for mine, theirs in zip(changed, cpu.changed, strict=True):
        assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))
    torch.testing.assert_close(sums, cpu_sums, rtol=1e-6, atol=0.0)
    for each in made:
        emulated.check_canaries(*each.changed, *each.gradients)


@pytest.mark.parametrize("form", FORMS)
def test_a_norm_that_is_not_finite_changes_nothing(kernels: emulated.Emulated, form: str) -> None:
    for norm in (float("inf"), float("nan")):
        start = case(form, [300, 7])
        each = start.copy()
        assert call(kernels.ops.adamw_, each, norm, sums=True).tolist() == [[0.0] * 3] * 2
        assert all(torch.equal(a, b) for a, b in zip(each.changed, start.changed, strict=True))


def test_sums_are_optional_and_empty_tensors_are_none(kernels: emulated.Emulated) -> None:
    each, cpu = case("master", [0, 0, 40]), case("master", [0, 0, 40])
    assert call(kernels.ops.adamw_, each, 0.5, sums=False).shape == (0, 3)
    call(torch.ops.headrace.adamw_, cpu, 0.5, sums=False)
    assert torch.equal(each.weights[2], cpu.weights[2])
    empty = case("master", [0, 0])
    assert call(kernels.ops.adamw_, empty, 0.5, sums=True).tolist() == [[0.0] * 3] * 2


def test_agrees_with_float64(kernels: emulated.Emulated) -> None:
    each = case("master", [1000, 31])
    true = each.doubled()
    sums = call(kernels.ops.adamw_, each, 3.0, sums=True)
    norm = torch.tensor([3.0], dtype=torch.float64)
    true_sums = adamw.reference(*true.lists, true.groups, grad_norm=norm, max_norm=1.0, sums=True)
    for mine, exact in zip(each.changed, true.changed, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=3e-6, atol=3e-8)
    torch.testing.assert_close(sums, true_sums, rtol=1e-3, atol=1e-12)
