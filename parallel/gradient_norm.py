"""The norm of all gradients, over every rank, by the fused sum of squares of `parallel/kernels/grad_norm.py`.

megatron-core's own `get_grad_norm` calls torch's norm once for each parameter. Which gradients count (not those of
shared parameters, nor what tensor-parallel ranks all have), and over which ranks they are summed, is megatron-core's to
say here too.
"""

from typing import Any

import torch
import torch.distributed as dist

from parallel import accelerator
from parallel.kernels import grad_norm


@torch.no_grad()
def gradient_norm(optimizer: Any) -> torch.Tensor:
    """float64[1] on the device: the norm of the gradients that `optimizer` (megatron's, a chain) is about to use, the
    same on every rank. Every rank calls this; nothing in it waits for the device."""
    parts = optimizer.chained_optimizers
    if optimizer.grads_states_parallel_group_is_shared():
        gradients = [gradient for part in parts for gradient in part.get_main_grads_for_grad_norm()]
        return _sum_over(optimizer.get_grad_stats_parallel_group(), gradients).sqrt()
    # Experts are spread over other ranks than the rest.
    sums = [_sum_over(part.get_grad_stats_parallel_group(), part.get_main_grads_for_grad_norm()) for part in parts]
    return torch.stack(sums).sum(dim=0).sqrt()


def _sum_over(group: dist.ProcessGroup | None, gradients: list[torch.Tensor]) -> torch.Tensor:
    """float64[1]: the sum of squares over the ranks of `group`, of which some may have no gradient."""
    total = grad_norm.fused(gradients)[1] if gradients else torch.zeros(1, dtype=torch.float64).to(accelerator.device())
    dist.all_reduce(total, group=group)
    return total
