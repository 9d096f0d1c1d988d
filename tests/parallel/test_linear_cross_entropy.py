"""Output layer and loss in one: against float64 autograd, the same however tokens are cut, never all of the logits."""

from typing import Any

import pytest
import torch
from process_group import run_ranks

from parallel import process_groups
from parallel.engine import parallel_state
from parallel.kernels import extension, head
from parallel.kernels.head_chunks import chunk_rows
from parallel.kernels.linear_cross_entropy import Head, HeadLoss, linear_cross_entropy
from parallel.layout import Layout

pytestmark = pytest.mark.skipif(bool(extension.problem()), reason=f"kernels: {extension.problem()}")

TOKENS, WIDTH, VOCABULARY, SOURCES = 52, 24, 256, 3


def random_case(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """(hidden, weight, labels, token weights, sources)."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype)
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    labels[::5] = head.IGNORE_INDEX
    return hidden, weight, labels, torch.rand(TOKENS, generator=generator), torch.arange(TOKENS) % SOURCES


def run(case: tuple[torch.Tensor, ...], options: Head, upstream: float = 1.0) -> tuple[HeadLoss, Any, Any]:
    """(loss, gradient of hidden, gradient of the weight)."""
    hidden, weight = (each.clone().requires_grad_() for each in case[:2])
    loss = linear_cross_entropy(hidden, weight, *case[2:], SOURCES, options)
    (loss.total * upstream).backward()
    return loss, hidden.grad, weight.grad


def expected(case: tuple[torch.Tensor, ...], z_loss: float, max_z_loss: float) -> tuple[torch.Tensor, ...]:
    """(total, gradient of hidden, gradient of the weight) in float64."""
    hidden, weight = (each.double().requires_grad_() for each in case[:2])
    logits = hidden @ weight.t()
    ce = torch.nn.functional.cross_entropy(logits, case[2], reduction="none", ignore_index=head.IGNORE_INDEX)
    terms = z_loss * logits.logsumexp(1) ** 2 + max_z_loss * logits.max(1)[0] ** 2
    total = ((ce + terms * (case[2] != head.IGNORE_INDEX)) * case[3]).sum()
    total.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return total.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize(("z_loss", "max_z_loss"), [(0.0, 0.0), (1e-2, 1e-2)])
@pytest.mark.parametrize("dtype", head.DTYPES)
def test_agrees_with_float64(dtype: torch.dtype, z_loss: float, max_z_loss: float) -> None:
    case = random_case(dtype)
    loss, grad_hidden, grad_weight = run(case, Head(z_loss=z_loss, max_z_loss=max_z_loss), upstream=2.5)
    total, true_hidden, true_weight = expected(case, z_loss, max_z_loss)
    off = 1e-6 if dtype == torch.float32 else 2e-2  # of bf16 logits of size 5
    assert float(loss.total.detach()) == pytest.approx(float(total), rel=off)
    for mine, true in ((grad_hidden, 2.5 * true_hidden), (grad_weight, 2.5 * true_weight)):
        assert mine.dtype == dtype
        assert float((mine.double() - true).norm() / true.norm()) < off
    logits = case[0].double() @ case[1].double().t()
    assert float(loss.logit_sum) == pytest.approx(float(logits.sum()), rel=1e-4 if dtype == torch.float32 else 0.1)


def test_chunks_change_nothing() -> None:
    case = random_case()
    whole, grad_hidden, grad_weight = run(case, Head(z_loss=1e-2))
    for rows in (1, 7, 51, 1000):
        options = Head(z_loss=1e-2, workspace_bytes=rows * VOCABULARY * 4)
        loss, chunk_hidden, chunk_weight = run(case, options)
        torch.testing.assert_close(loss.reported, whole.reported, rtol=1e-6, atol=1e-6)  # products differ in rounding
        torch.testing.assert_close(chunk_hidden, grad_hidden, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(chunk_weight, grad_weight, rtol=1e-5, atol=1e-5)
        assert torch.equal(loss.counters[:, 0], whole.counters[:, 0])


def test_chunks_have_the_size_of_the_workspace() -> None:
    assert chunk_rows(6000, 139_776, 2, 1_150_000_000) == 3072
    assert chunk_rows(4096, 139_776, 2, 1_150_000_000) == 4096
    assert chunk_rows(100, 32_000, 4, 2**28) == 128
    assert chunk_rows(4096, 32_000, 4, 2**28) == 2048
    assert chunk_rows(10, 1000, 4, 1) == 1
    for tokens in (1, 127, 128, 5000, 131_072):
        for columns in (1, 32_000, 139_776):
            for space in (1, 2**20, 2**28):
                rows = chunk_rows(tokens, columns, 4, space)
                assert rows == 1 or min(rows, tokens) * columns * 4 <= max(space, 128 * columns * 4)


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the largest tensor that an operator gave."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in torch.utils._pytree.tree_leaves(out):
            if isinstance(each, torch.Tensor):
                self.numbers = max(self.numbers, each.untyped_storage().nbytes() // each.element_size())
        return out


@pytest.mark.parametrize("dtype", head.DTYPES)
def test_the_logits_of_all_tokens_are_never_there(dtype: torch.dtype) -> None:
    case = random_case(dtype)
    with Largest() as largest:
        run(case, Head(workspace_bytes=8 * VOCABULARY * dtype.itemsize))
    assert largest.numbers <= max(8 * VOCABULARY, VOCABULARY * WIDTH)
    assert largest.numbers < TOKENS * VOCABULARY


def test_the_weights_gradient_goes_into_main_grad() -> None:
    case = random_case()
    _, _, grad_weight = run(case, Head())
    weight = case[1].clone().requires_grad_()
    weight.main_grad = torch.ones_like(weight)  # type: ignore[attr-defined]
    hidden = case[0].clone().requires_grad_()
    loss = linear_cross_entropy(hidden, weight, *case[2:], SOURCES, Head(accumulate=True))
    loss.total.backward()
    assert weight.grad is None
    torch.testing.assert_close(weight.main_grad - 1.0, grad_weight, rtol=1e-5, atol=1e-5)  # type: ignore[attr-defined]
    loss = linear_cross_entropy(hidden, weight, *case[2:], SOURCES, Head(accumulate=True, placeholder=True))
    loss.total.backward()
    assert weight.grad is not None  # somebody waits for it; what it holds is not to be used
    assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
    loss = linear_cross_entropy(hidden, weight, *case[2:], SOURCES, Head(accumulate=True))
    with pytest.raises(RuntimeError, match="main_grad already, unscaled"):
        (loss.total * 2.0).backward()


def test_without_gradients_nothing_is_prepared_for_them() -> None:
    case = random_case()
    weight = case[1].clone().requires_grad_()
    weight.main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]
    with torch.no_grad():
        loss = linear_cross_entropy(case[0], weight, *case[2:], SOURCES, Head(accumulate=True))
    assert not weight.main_grad.any()  # type: ignore[attr-defined]
    assert not loss.total.requires_grad
    frozen = case[0].clone().requires_grad_()
    linear_cross_entropy(frozen, case[1], *case[2:], SOURCES, Head()).total.backward()
    torch.testing.assert_close(frozen.grad, run(case, Head())[1])


def test_no_tokens_and_all_ignored() -> None:
    case = random_case()
    nothing = (case[0][:0], case[1], *(each[:0] for each in case[2:]))
    loss, grad_hidden, grad_weight = run(nothing, Head(z_loss=1.0))
    assert float(loss.total.detach()) == 0.0
    assert not grad_weight.any()
    ignored = (*case[:2], torch.full_like(case[2], head.IGNORE_INDEX), *case[3:])
    loss, grad_hidden, grad_weight = run(ignored, Head(z_loss=1.0))
    assert float(loss.total.detach()) == 0.0
    assert not loss.counters.any()
    assert not grad_hidden.any()
    assert not grad_weight.any()


@pytest.mark.multiprocess
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_split_vocabulary_changes_nothing(ranks: int, sequence_parallel: bool) -> None:
    case = random_case()
    options = {"z_loss": 1e-2, "max_z_loss": 1e-2, "workspace_bytes": 20 * VOCABULARY // ranks * 4}
    whole, grad_hidden, grad_weight = run(case, Head(**options))  # type: ignore[arg-type]

    def work() -> tuple[Any, ...]:
        tp_rank = process_groups.initialize(Layout(ranks, tensor_parallel_size=ranks), seed=1, timeout_s=60).tp_rank
        hidden = case[0].chunk(ranks)[tp_rank] if sequence_parallel else case[0]
        own = (hidden, case[1].chunk(ranks)[tp_rank], *case[2:])
        group = parallel_state.get_tensor_model_parallel_group()
        how = Head(**options, group=group, sequence_parallel=sequence_parallel)  # type: ignore[arg-type]
        loss, *gradients = run(own, how)
        return (*(each.detach() for each in loss), *gradients)

    found = run_ranks(ranks, work, timeout_s=120)
    for each in found:
        torch.testing.assert_close(each[1], whole.reported, rtol=1e-6, atol=1e-6)
        assert all(torch.equal(mine, first) for mine, first in zip(each[:4], found[0][:4], strict=True))
        assert torch.equal(each[3][:, [0, 3, 4]], whole.counters[:, [0, 3, 4]])
        if not sequence_parallel:
            torch.testing.assert_close(each[5], grad_hidden, rtol=1e-5, atol=1e-5)
    if sequence_parallel:
        torch.testing.assert_close(torch.cat([each[5] for each in found]), grad_hidden, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([each[6] for each in found]), grad_weight, rtol=1e-5, atol=1e-5)
    assert float(sum(each[4] for each in found)) == pytest.approx(float(whole.logit_sum), rel=1e-4)


def test_what_does_not_fit_is_refused() -> None:
    case = random_case()
    with pytest.raises(ValueError, match=r"hidden \[52, 24\] and weight \[256, 20\] must be"):
        linear_cross_entropy(case[0], case[1][:, :20], *case[2:], SOURCES)
    with pytest.raises(TypeError, match=r"hidden is torch\.bfloat16, weight torch\.float32; they must be the same"):
        linear_cross_entropy(case[0].bfloat16(), *case[1:], SOURCES)
    with pytest.raises(TypeError, match=r"labels are torch\.int32"):
        linear_cross_entropy(*case[:2], case[2].int(), *case[3:], SOURCES)
