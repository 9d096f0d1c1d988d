"""The loss: against plain PyTorch, split over ranks, and exact whatever the order of its sums."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from process_group import run_ranks

from parallel import process_groups
from parallel.engine import parallel_state
from parallel.layout import Layout
from pretrain.loss import FIXED_POINT, loss_function, source_report, vocab_parallel_cross_entropy

COEFFICIENTS = [(0.0, 0.0), (1e-2, 0.0), (0.0, 1e-2), (3e-2, 2e-2)]


class OneRank:
    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = 4.0 * torch.randn(19, 24, generator=generator)
    return logits, torch.randint(0, 24, (19,), generator=generator), torch.rand(19, generator=generator)


def plain(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, z_loss: float, max_z_loss: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(reported, minimised, gradient of weights·minimised) in double precision."""
    logits = logits.double().requires_grad_()
    reported = F.cross_entropy(logits, labels, reduction="none")
    log_z, highest = logits.logsumexp(1), logits.max(1)[0]
    minimised = reported + z_loss * log_z**2 + max_z_loss * highest**2
    (minimised * weights).sum().backward()
    assert logits.grad is not None
    return reported.detach(), minimised.detach(), logits.grad


@pytest.mark.parametrize(("z_loss", "max_z_loss"), COEFFICIENTS)
def test_agrees_with_plain_pytorch(z_loss: float, max_z_loss: float) -> None:
    logits, labels, weights = case()
    leaf = logits.clone().requires_grad_()
    reported, minimised = vocab_parallel_cross_entropy(leaf * 1.0, labels, OneRank(), z_loss, max_z_loss)
    (minimised * weights).sum().backward()
    expected = plain(logits, labels, weights, z_loss, max_z_loss)
    for mine, theirs in zip((reported, minimised, leaf.grad), expected, strict=True):
        torch.testing.assert_close(mine, theirs.float(), rtol=1e-5, atol=1e-6)
    assert not reported.requires_grad
    if not (z_loss or max_z_loss):
        assert torch.equal(reported, minimised)


@pytest.mark.multiprocess
@pytest.mark.parametrize(("z_loss", "max_z_loss"), COEFFICIENTS)
def test_a_split_vocabulary_changes_nothing(z_loss: float, max_z_loss: float) -> None:
    logits, labels, weights = case()
    logits[0, 3] = logits[0, 20] = 30.0  # two ranks tie for the maximum: one subgradient, the lower rank's

    def work() -> tuple[torch.Tensor, ...]:
        ranks = process_groups.initialize(Layout(2, tensor_parallel_size=2), seed=1, timeout_s=60)
        group = parallel_state.get_tensor_model_parallel_group()
        part = logits[:, 12 * ranks.tp_rank : 12 * (ranks.tp_rank + 1)].clone().requires_grad_()
        reported, minimised = vocab_parallel_cross_entropy(part * 1.0, labels, group, z_loss, max_z_loss)
        (minimised * weights).sum().backward()
        assert part.grad is not None
        return reported.detach(), minimised.detach(), part.grad

    leaf = logits.clone().requires_grad_()
    reported, minimised = vocab_parallel_cross_entropy(leaf * 1.0, labels, OneRank(), z_loss, max_z_loss)
    (minimised * weights).sum().backward()
    first, second = run_ranks(2, work)
    for split in (first, second):
        torch.testing.assert_close(split[0], reported, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(split[1], minimised.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.cat((first[2], second[2]), dim=1), leaf.grad, rtol=1e-5, atol=1e-6)


def test_masked_tokens_count_nowhere_even_when_not_finite() -> None:
    reported = torch.tensor([[1.0, 2.0, float("nan"), 4.0]])
    minimised = (reported * 10).requires_grad_()
    mask = torch.tensor([[True, False, False, True]])
    total, number, report = loss_function((reported, minimised), mask, torch.tensor([1, 1, 0, 0]), 2)
    total.backward()
    assert float(total) == 50.0
    assert int(number) == 2
    assert number.dtype == torch.int32
    assert report.tolist() == [[4 * FIXED_POINT, 1 * FIXED_POINT], [1, 1], [0, 0]]
    assert minimised.grad is not None
    assert minimised.grad.tolist() == [[1.0, 0.0, 0.0, 1.0]]


def test_a_loss_that_is_not_finite_is_counted_not_summed() -> None:
    reported = torch.tensor([1.5, float("inf"), float("nan")])
    report = source_report(reported, torch.ones(3, dtype=torch.bool), torch.tensor([0, 0, 1]), 2)
    assert report.tolist() == [[int(1.5 * FIXED_POINT), 0], [2, 1], [1, 1]]


@given(st.data())
def test_source_sums_do_not_depend_on_order_or_on_the_split(data: st.DataObject) -> None:
    losses = data.draw(st.lists(st.floats(0.0, 60.0, width=32), min_size=2, max_size=40))
    reported = torch.tensor(losses)
    sources = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=len(losses), max_size=len(losses))))
    mask = torch.ones(len(losses), dtype=torch.bool)
    whole = source_report(reported, mask, sources, 3)
    order = torch.tensor(data.draw(st.permutations(range(len(losses)))))
    cut = data.draw(st.integers(1, len(losses) - 1))
    parts = [source_report(reported[part], mask[part], sources[part], 3) for part in (order[:cut], order[cut:])]
    assert torch.equal(parts[0] + parts[1], whole)
    for source in range(3):
        exact = math.fsum(float(reported[i]) for i in range(len(losses)) if sources[i] == source)
        assert abs(int(whole[0, source]) / FIXED_POINT - exact) <= len(losses) / FIXED_POINT
