"""RMSNorm and LayerNorm that may be used under sequence parallelism.

megatron-core's own wrapper around torch's norms refuses sequence parallelism and persistent kernels. The only thing
missing is the mark on the weights that makes `finalize_model_grads` sum their gradients over the tensor-parallel group.
"""

from typing import Any

import torch

from parallel import accelerator


class Norm:
    """Builds the norm that `config.normalization` names; `hidden_size` is the normalised last dimension."""

    def __new__(  # type: ignore[misc]
        cls, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> torch.nn.Module:
        kind = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}[config.normalization]
        norm: torch.nn.Module = kind(hidden_size, eps=eps).to(device=accelerator.device(), dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm
