"""AdamW with the state layout megatron-core's checkpoints expect.

megatron-core takes Adam from TransformerEngine or apex, and falls back to `torch.optim.AdamW`, whose per-parameter
`step` tensors break the distributed optimizer's resume (an assertion, then a KeyError, and once those are worked
around silently wrong losses). FusedAdam keeps `step` in the parameter group; this class does the same around torch's
fused kernel.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adam import adam


class GroupStepAdam(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) on fp32 parameters; `step` is an int in each parameter group.

    With `adam_w_mode=False` weight decay is added to the gradient instead, as in the original Adam.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        **_: Any,
    ) -> None:
        self.adam_w_mode = adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            for param in params:
                if not self.state[param]:
                    self.state[param].update(exp_avg=torch.zeros_like(param), exp_avg_sq=torch.zeros_like(param))
            # The kernel increments every step tensor, so each parameter needs its own.
            steps = torch.full((len(params),), float(group["step"] - 1), device=params[0].device).unbind()
            adam(
                params,
                [param.grad for param in params],
                [self.state[param]["exp_avg"] for param in params],
                [self.state[param]["exp_avg_sq"] for param in params],
                [],
                list(steps),
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
                decoupled_weight_decay=self.adam_w_mode,
            )
