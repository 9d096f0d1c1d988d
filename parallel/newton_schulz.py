"""Orthogonalisation by matrix products alone: the quintic Newton-Schulz iteration of Muon.

torch.optim.Muon has the same iteration, but under a private name and in bf16 only.
"""

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
EPSILON = 1e-7


def orthogonalize(matrix: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Near the orthogonal factor U·Vᵀ of `matrix` = U·S·Vᵀ; fp32, same shape. Computed in `dtype`.

    Five steps of X ← a·X + b·(X·Xᵀ)·X + c·(X·Xᵀ)²·X from X = matrix / its Frobenius norm (Keller Jordan 2024,
    https://kellerjordan.github.io/posts/muon). The coefficients make small singular values grow fast instead of making
    any converge: those above 1/400 of the norm come out between 0.68 and 1.21. All zeros stay zeros.
    """
    a, b, c = COEFFICIENTS
    wide = matrix.size(0) <= matrix.size(1)
    x = (matrix if wide else matrix.mT).to(dtype)
    x = x / x.norm().clamp(min=EPSILON)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).float()
