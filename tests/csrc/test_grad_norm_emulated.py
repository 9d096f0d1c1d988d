"""The CUDA kernels of the gradient norm on the emulator: one sum under every schedule, right by float64."""

import emulated
import pytest
import torch

from parallel.kernels import grad_norm

pytestmark = emulated.needs_emulator
SIZES = [16_384 * 2 + 1003, 8, 1, 0, 4096, 1033]


@pytest.fixture(scope="module")
def kernels() -> emulated.Emulated:
    return emulated.load("grad_norm")


def gradients(dtype: torch.dtype, offset: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    own = [emulated.guarded((size,), dtype, offset) for size in SIZES]
    for number, tensor in enumerate(own):
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 10.0 ** (number - 3))
    return own


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "not aligned"])
@pytest.mark.parametrize("dtype", grad_norm.DTYPES)
def test_agrees_with_float64(kernels: emulated.Emulated, dtype: torch.dtype, offset: int) -> None:
    own = gradients(dtype, offset)
    found = emulated.under_every_schedule(kernels, lambda: kernels.ops.square_sums(own))
    for ours, true in zip(found, grad_norm.reference(own), strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-6, atol=0.0)
    emulated.check_canaries(*own)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_says_what_is_not_finite(kernels: emulated.Emulated, bad: float) -> None:
    own = gradients(torch.float32, 0)
    own[0][16_384 * 2 + 1002] = bad
    sums, total, flag = kernels.ops.square_sums(own)
    assert sums.isfinite().tolist() == [False, True, True, True, True, True]
    assert not bool(total.isfinite())
    assert flag.tolist() == [1.0]


def test_tensors_may_all_be_empty(kernels: emulated.Emulated) -> None:
    sums, total, flag = kernels.ops.square_sums([torch.zeros(0), torch.zeros(0, 3)])
    assert (sums.tolist(), total.tolist(), flag.tolist()) == ([0.0, 0.0], [0.0], [0.0])
