"""AdamW with the state layout megatron-core's checkpoints expect.

megatron-core takes Adam from TransformerEngine or apex, and falls back to `torch.optim.AdamW`, whose per-parameter
`step` tensors break the distributed optimizer's resume (an assertion, then a KeyError, and once those are worked
around silently wrong losses). FusedAdam keeps `step` in the parameter group; this class does the same around torch's
fused kernel, or around ours (`parallel/kernels/adamw.py`), which takes clipping, 16-bit weights and sums for metrics
into its one pass. State and checkpoints are the same with either.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.optim.adam import adam

from parallel.kernels import adamw


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
        self.fused = False
        """Updates are ours; see `use_fused`."""
        self.sums: dict[torch.Tensor, torch.Tensor] = {}
        """With `keep_sums`, of the last update: for each parameter float64[3], the sums of squares of its gradient
        before clipping, of its change, and of itself before."""
        self._copies: Mapping[torch.Tensor, torch.Tensor] = {}
        self._clip: tuple[torch.Tensor, float] | None = None
        self._keep_sums = False
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        graded: list[list[Any]] = []
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            graded.append([param for param in group["params"] if param.grad is not None])
            for param in graded[-1]:
                if not self.state[param]:
                    self.state[param].update(exp_avg=torch.zeros_like(param), exp_avg_sq=torch.zeros_like(param))
        if self.fused:
            self._step_fused(graded)
        else:
            self._step_torch(graded)

    # -- our kernel ----------------------------------------------------------------------------------------------

    def use_fused(self, copies: Mapping[torch.Tensor, torch.Tensor]) -> None:
        """Let `parallel.kernels.adamw` make the updates. `copies` are bf16 weights by the fp32 parameter that each has
        as its master; an update writes them too."""
        assert self.adam_w_mode, "our kernel decouples weight decay from the gradient"
        self.fused, self._copies = True, copies

    def clip(self, grad_norm: torch.Tensor, max_norm: float) -> None:
        """Scale gradients in the next update, and only in it, as if their norm, float64[1], had been clipped to
        `max_norm`; where it is not finite nothing changes. They stay as they are in memory."""
        assert self.fused, "torch's kernel takes gradients that have been clipped"
        self._clip = grad_norm, max_norm

    def keep_sums(self, wanted: bool = True) -> None:
        """Leave `sums` behind the next update, and only behind it; False: not even then."""
        assert self.fused, "torch's kernel adds nothing up"
        self._keep_sums = wanted

    def _step_fused(self, graded: list[list[Any]]) -> None:
        keep_sums, self._keep_sums, self.sums = self._keep_sums, False, {}
        grad_norm, max_norm = self._clip or (None, 0.0)
        self._clip = None
        for with_copy in (False, True):
            chosen = [[param for param in params if (param in self._copies) == with_copy] for params in graded]
            params = [param for group in chosen for param in group]
            if not params:
                continue
            sums = adamw.fused(
                params,
                [param.grad for param in params],
                [self.state[param]["exp_avg"] for param in params],
                [self.state[param]["exp_avg_sq"] for param in params],
                [
                    adamw.Group(
                        tensors=len(own),
                        lr=group["lr"],
                        weight_decay=group["weight_decay"],
                        beta1=group["betas"][0],
                        beta2=group["betas"][1],
                        eps=group["eps"],
                        step=group["step"],
                    )
                    for own, group in zip(chosen, self.param_groups, strict=True)
                ],
                lows=[self._copies[param] for param in params] if with_copy else (),
                grad_norm=grad_norm,
                max_norm=max_norm,
                sums=keep_sums,
            )
            if keep_sums:
                self.sums.update(zip(params, sums.unbind(), strict=True))

    # -- torch's kernel ------------------------------------------------------------------------------------------

    def _step_torch(self, graded: list[list[Any]]) -> None:
        for group, params in zip(self.param_groups, graded, strict=True):
            if not params:
                continue
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
