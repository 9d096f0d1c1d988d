"""GeGLU's and bias-GELU's CUDA kernels on the emulator: the same bits under every schedule, right by float64."""

import emulated
import pytest
import torch

from parallel.kernels import bias_gelu, geglu

pytestmark = emulated.needs_emulator
aligned = pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "not aligned"])
dtypes = pytest.mark.parametrize("dtype", bias_gelu.DTYPES)
tanhs = pytest.mark.parametrize("tanh", [False, True], ids=["exact", "tanh"])
TOLERANCE = {torch.float32: {"rtol": 2e-6, "atol": 2e-6}, torch.bfloat16: {"rtol": 2**-8, "atol": 2e-6}}


def loaded(family: str, request: pytest.FixtureRequest) -> emulated.Emulated:
    """Once with launches so small that tensors need many."""
    return emulated.load(family, () if request.param is None else (f"HEADRACE_PACKS_PER_LAUNCH={request.param}",))


@pytest.fixture(scope="module", params=[None, 3], ids=["one launch", "slices"])
def with_bias(request: pytest.FixtureRequest) -> emulated.Emulated:
    return loaded("bias_gelu", request)


@pytest.fixture(scope="module", params=[None, 96], ids=["one launch", "slices"])
def gated(request: pytest.FixtureRequest) -> emulated.Emulated:
    return loaded("geglu", request)


def random(shape: tuple[int, ...], dtype: torch.dtype, offset: int, seed: int, scale: float = 2.0) -> torch.Tensor:
    tensor = emulated.guarded(shape, dtype, offset)
    tensor.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale)
    return tensor


def approximate(tanh: bool) -> bias_gelu.Approximate:
    return "tanh" if tanh else "none"


@aligned
@dtypes
@tanhs
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 5), (65, 8), (130, 264), (9, 300), (0, 8), (3, 0)])
def test_bias_gelu_agrees_with_float64(
    with_bias: emulated.Emulated, rows: int, width: int, dtype: torch.dtype, tanh: bool, offset: int
) -> None:
    input, grad = (random((rows, width), dtype, offset, seed) for seed in (1, 2))
    bias = random((width,), dtype, offset, 3)
    found = emulated.under_every_schedule(
        with_bias,
        lambda: (
            with_bias.ops.bias_gelu_forward(input, bias, tanh),
            *with_bias.ops.bias_gelu_backward(grad, input, bias, tanh),
        ),
    )
    leaves = [input.double().requires_grad_(), bias.double().requires_grad_()]
    hidden = bias_gelu.reference(*leaves, approximate(tanh))
    hidden.backward(grad.double())
    true = [hidden.detach(), leaves[0].grad, leaves[1].grad]
    for mine, right, terms in zip(found, true, (1, 1, max(1, rows)), strict=True):
        assert right is not None
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(mine.double(), right, rtol=tolerance["rtol"], atol=tolerance["atol"] * terms)
    emulated.check_canaries(input, grad, bias)


@aligned
@dtypes
@tanhs
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (7, 8), (5, 64), (40, 24), (1, 1030), (0, 8)])
def test_geglu_agrees_with_float64(
    gated: emulated.Emulated, rows: int, width: int, dtype: torch.dtype, tanh: bool, offset: int
) -> None:
    gate_up, grad = random((rows, 2 * width), dtype, offset, 1), random((rows, width), dtype, offset, 2, 1.0)
    found = emulated.under_every_schedule(
        gated, lambda: (gated.ops.geglu_forward(gate_up, tanh), gated.ops.geglu_backward(grad, gate_up, tanh))
    )
    leaf = gate_up.double().requires_grad_()
    hidden = geglu.reference(leaf, approximate(tanh))
    hidden.backward(grad.double())
    assert leaf.grad is not None
    for mine, right in zip(found, (hidden.detach(), leaf.grad), strict=True):
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(mine.double(), right, rtol=tolerance["rtol"], atol=10 * tolerance["atol"])
    emulated.check_canaries(gate_up, grad)
