"""RMSNorm and LayerNorm that may be used under sequence parallelism, and norms that do the residual addition too.

megatron-core's own wrapper around torch's norms refuses sequence parallelism and persistent kernels. The only thing
missing is the mark on the weights that makes `finalize_model_grads` sum their gradients over the tensor-parallel group.
"""

from typing import Any, ClassVar

import torch

from parallel import accelerator
from parallel.kernels import residual_norm


class Norm:
    """Builds the norm that `config.normalization` names; `hidden_size` is the normalised last dimension."""

    kinds: ClassVar[dict[str, type[torch.nn.Module]]] = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}

    def __new__(  # type: ignore[misc]
        cls, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> torch.nn.Module:
        kind = cls.kinds[config.normalization]
        norm = kind(hidden_size, eps=eps).to(device=accelerator.device(), dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


class FusedRMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm by the fused kernel; `norm.add(x, residual)` does the addition in the same pass."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        """The norm of `x`; with `residual` the norm of their sum, that sum and its rows' sums of squares (`Normed`)."""
        return _apply(x, residual, self.weight, None, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> residual_norm.Normed:
        """x + residual and its norm, called as a module is, so that hooks on it run."""
        return self(x, residual)  # type: ignore[no-any-return]


class FusedLayerNorm(torch.nn.LayerNorm):
    """torch's LayerNorm by the fused kernel; `norm.add(x, residual)` does the addition in the same pass."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        """The norm of `x`; with `residual` the norm of their sum, that sum and its rows' sums of squares (`Normed`)."""
        return _apply(x, residual, self.weight, self.bias, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> residual_norm.Normed:
        """x + residual and its norm, called as a module is, so that hooks on it run."""
        return self(x, residual)  # type: ignore[no-any-return]


class FusedNorm(Norm):
    """Norm whose norms are the fused ones; their parameters have the same names."""

    kinds: ClassVar[dict[str, type[torch.nn.Module]]] = {"RMSNorm": FusedRMSNorm, "LayerNorm": FusedLayerNorm}


def _apply(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None, eps: float | None
) -> Any:
    assert eps is not None  # Norm always gives one
    whole = None if residual is None else residual.contiguous()
    normed = residual_norm.fused(x.contiguous(), whole, weight, bias, eps)
    return normed.normalised if residual is None else normed
