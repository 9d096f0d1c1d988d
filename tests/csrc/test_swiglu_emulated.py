"""SwiGLU's CUDA kernels on the emulator: the same bits under every schedule, right by float64, no write beside."""

import emulated
import pytest
import torch

from parallel.kernels import swiglu

pytestmark = emulated.needs_emulator
SHAPES = [(1, 1), (3, 5), (7, 8), (5, 64), (2, 352), (40, 24), (1, 1030), (0, 8), (3, 0)]


@pytest.fixture(scope="module", params=[None, 96], ids=["one launch", "slices"])
def kernels(request: pytest.FixtureRequest) -> emulated.Emulated:
    """Once with launches so small that tensors need many."""
    return emulated.load("swiglu", () if request.param is None else (f"HEADRACE_PACKS_PER_LAUNCH={request.param}",))


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "not aligned"])
@pytest.mark.parametrize("dtype", swiglu.DTYPES)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_agrees_with_float64(
    kernels: emulated.Emulated, rows: int, width: int, dtype: torch.dtype, offset: int
) -> None:
    generator = torch.Generator().manual_seed(rows * width)
    gate_up = emulated.guarded((rows, 2 * width), dtype, offset)
    grad = emulated.guarded((rows, width), dtype, offset)
    gate_up.copy_(torch.randn(gate_up.shape, generator=generator) * 4)
    grad.copy_(torch.randn(grad.shape, generator=generator))
    hidden, grad_gate_up = emulated.under_every_schedule(
        kernels, lambda: (kernels.ops.swiglu_forward(gate_up), kernels.ops.swiglu_backward(grad, gate_up))
    )
    true = gate_up.double().requires_grad_()
    true_hidden = swiglu.reference(true)
    true_hidden.backward(grad.double())
    assert true.grad is not None
    tolerance = {"rtol": 2e-6, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-6}
    torch.testing.assert_close(hidden.double(), true_hidden.detach(), **tolerance)
    torch.testing.assert_close(grad_gate_up.double(), true.grad, **tolerance)
    emulated.check_canaries(gate_up, grad)
