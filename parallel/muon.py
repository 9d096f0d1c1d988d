"""Muon: momentum whose singular values are all made alike before it is applied (Keller Jordan 2024).

    buffer ← μ·buffer + gradient
    update = orthogonalize(gradient + μ·buffer)             (without Nesterov: of the buffer)
    weight ← (1 - lr·decay)·weight - lr·0.2·√max(rows, columns)·update

The factor is Moonlight's (arXiv 2502.16982, equation 4): an orthogonal matrix of rows x columns has a root mean square
of 1/√max(rows, columns), so every update has one of 0.2, as AdamW's have, and both share learning rate and decay.

It is for matrices. Those that are stored as one (see `fused_matrices`) are orthogonalised one by one. Of a matrix that
is split over tensor-parallel ranks, every rank gathers the whole momentum and applies its own part of the update, so
that it equals that of a single process; the momentum itself stays split.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist

from parallel.fused_matrices import AttentionShape, join, split
from parallel.newton_schulz import orthogonalize

UPDATE_RMS = 0.2


class Muon(torch.optim.Optimizer):
    """Muon on fp32 matrices; a parameter group's `fusion` says how its matrices are fused (`none` when missing).

    A parameter with megatron-core's `tensor_model_parallel` and `partition_dim` marks is split over `tensor_parallel`.
    State: `momentum_buffer`, of the parameter's shape. The iteration computes in `dtype`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float,
        nesterov: bool,
        weight_decay: float,
        attention: AttentionShape,
        tensor_parallel: dist.ProcessGroup | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.attention, self.tensor_parallel, self.dtype = attention, tensor_parallel, dtype
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"fusion": "none"})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state, momentum = self.state[param], group["momentum"]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(param)
                buffer = state["momentum_buffer"]
                buffer.mul_(momentum).add_(param.grad)
                direction = param.grad.add(buffer, alpha=momentum) if group["nesterov"] else buffer
                parts = split(direction, group["fusion"], self.attention)
                update = join([self._orthogonal(part, param) for part in parts], group["fusion"], self.attention)
                param.mul_(1.0 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])

    def _orthogonal(self, part: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
        """This rank's rows or columns of the scaled orthogonal factor of the matrix that `part` belongs to."""
        group = self.tensor_parallel
        if group is None or dist.get_world_size(group) == 1 or not getattr(param, "tensor_model_parallel", False):
            return _scaled(part, self.dtype)
        dim: int = param.partition_dim  # type: ignore[attr-defined]
        pieces = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(pieces, part.contiguous(), group=group)
        return _scaled(torch.cat(pieces, dim=dim), self.dtype).chunk(group.size(), dim=dim)[group.rank()]


def _scaled(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return orthogonalize(matrix, dtype).mul_(UPDATE_RMS * math.sqrt(max(matrix.shape)))
