"""GeGLU (arXiv 2002.05202): hidden = gelu(gate) · up, with the exact GELU or its tanh approximation (`bias_gelu.py`).

Both forms take `gate_up`, [..., 2·width] with the gate in the first half of the last dimension, and give `hidden`,
[..., width]. What the fused one moves and keeps: `gated.py`.
"""

import torch
import torch.nn.functional as F

from parallel.kernels import extension, gated
from parallel.kernels.bias_gelu import Approximate
from parallel.kernels.choice import Kernel
from parallel.kernels.self_test import Trial

DTYPES = gated.DTYPES
"""What the fused form takes."""
FASTER_ON = frozenset({"cpu"})
"""Devices where `benchmarks/kernels.py` measured the fused form to be faster (benchmarks/results/kernels.json). CUDA is
missing because no GPU was at hand: there `auto` is torch until somebody has measured."""
KERNEL = Kernel("geglu", ("geglu_forward", "geglu_backward"), FASTER_ON)


def reference(gate_up: torch.Tensor, approximate: Approximate = "none") -> torch.Tensor:
    """GeGLU by torch's own operators; any floating dtype and strides. `gate_up` [..., 2·width] → [..., width]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate=approximate) * up


def fused(gate_up: torch.Tensor, approximate: Approximate = "none") -> torch.Tensor:
    """GeGLU in one pass. `gate_up` contiguous fp32 or bf16 [..., 2·width] → [..., width], same dtype.

    Differentiable once, under autograd and torch.compile. Raises TypeError for other dtypes, ValueError for other
    shapes and strides.
    """
    gated.check("geglu", gate_up)
    hidden: torch.Tensor = torch.ops.headrace.geglu_forward(gate_up, approximate == "tanh")
    return hidden


TRIAL = Trial(KERNEL, lambda: (torch.randn(512, 2 * 704, dtype=torch.float64),), fused, reference)

if extension.has(*KERNEL.operators):
    gated.register("geglu")
