"""The Newton-Schulz iteration against the singular value decomposition it stands in for."""

import numpy as np
import pytest
import torch

from parallel.newton_schulz import COEFFICIENTS, STEPS, orthogonalize

SHAPES = [(8, 8), (48, 16), (16, 48), (64, 64)]


def iterated(singular: np.ndarray) -> np.ndarray:
    """What five steps make of singular values, in float64."""
    a, b, c = COEFFICIENTS
    x = singular / np.sqrt((singular**2).sum())
    for _ in range(STEPS):
        x = a * x + b * x**3 + c * x**5
    return x


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_polynomial_of_the_singular_values(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    left, singular, right = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    expected = left @ np.diag(iterated(singular)) @ right
    np.testing.assert_allclose(orthogonalize(matrix).numpy(), expected, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_out_near_one(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    singular = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    got = np.linalg.svd(orthogonalize(matrix, dtype).double().numpy(), compute_uv=False)
    reached = np.sort(got)[::-1][: int((singular > np.sqrt((singular**2).sum()) / 400).sum())]
    slack = 0.0 if dtype == torch.float32 else 0.05
    assert reached.min() > 0.68 - slack
    assert reached.max() < 1.21 + slack


def test_scale_does_not_matter_and_zeros_stay() -> None:
    matrix = torch.randn(6, 9, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(orthogonalize(1e-4 * matrix), orthogonalize(1e4 * matrix), rtol=1e-4, atol=1e-4)
    assert not orthogonalize(torch.zeros(4, 3)).any()
