"""Any torch optimizers as one megatron-core optimizer, whole or with each parameter's state on one rank only.

megatron-core's distributed optimizer cuts parameters anywhere and knows Adam's state alone. Muon needs whole matrices,
SGD has other state. Here a data-parallel rank owns whole parameters instead (Moonlight's distributed Muon, arXiv
2502.16982, section 2.3, with ZeRO-1's split, arXiv 1910.02054): only the owner has the fp32 master weight and the
optimizer state, only it computes the update, and an all-gather brings the new weights to everybody. Example, two ranks
and matrices of 6, 5, 4 and 3 million weights: rank 0 owns those of 6 and 3, rank 1 those of 5 and 4.

megatron-core has a class for the same (`LayerWiseDistributedOptimizer`); it cannot save in fp32, gathers tensors of
uneven size, which gloo refuses, and its checkpoints are for one data-parallel size. In checkpoints of this one, tensors
stand under their parameter's name, so that any layout loads any other's; parameter groups are not stored at all.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from parallel.engine import (
    ChainedOptimizer,
    DynamicGradScaler,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    extract_sharded_tensors_and_factories,
    make_sharded_optimizer_tensor,
    nested_values,
    parallel_state,
)
from parallel.owners import assign_owners


class Part(NamedTuple):
    """A torch optimizer for some of the parameters."""

    optimizer: torch.optim.Optimizer
    state_keys: tuple[str, ...]
    """Its tensors for each parameter, of the parameter's shape and zero at the start."""


class WholeParameterOptimizer(ChainedOptimizer):  # type: ignore[misc]
    """`parts` together, in fp32 or over 16-bit weights with fp32 master weights, as `config` (megatron's) says.

    `names` are the parameters' names in checkpoints. With `distributed`, the parts keep only the parameters that this
    data-parallel rank owns.
    """

    def __init__(
        self, parts: Sequence[Part], config: Any, names: Mapping[torch.nn.Parameter, str], distributed: bool
    ) -> None:
        self._parts, self._names = list(parts), names
        self._group = parallel_state.get_data_parallel_group(with_context_parallel=True) if distributed else None
        self._owned_by: list[list[torch.nn.Parameter]] = []
        if self._group is not None:
            self._keep_own()
        self._models = [[list(group["params"]) for group in part.optimizer.param_groups] for part in self._parts]
        super().__init__([self._wrap(part, config) for part in self._parts])

    def _keep_own(self) -> None:
        assert self._group is not None
        groups = [group for part in self._parts for group in part.optimizer.param_groups]
        parameters = [parameter for group in groups for parameter in group["params"]]
        owners = assign_owners([parameter.numel() for parameter in parameters], self._group.size())
        owner = dict(zip(parameters, owners, strict=True))
        self._owned_by = [[p for p in parameters if owner[p] == rank] for rank in range(self._group.size())]
        for group in groups:
            group["params"] = [p for p in group["params"] if owner[p] == self._group.rank()]

    def _wrap(self, part: Part, config: Any) -> Any:
        if config.bf16 or config.fp16:
            scaler = grad_scaler(config) if config.fp16 else None
            wrapped = Float16OptimizerWithFloat16Params(part.optimizer, config, scaler, None)
        else:
            wrapped = FP32Optimizer(part.optimizer, config, None)
        # Owners hold different gradients, so their norm is a sum over all ranks; else each replica has all of it.
        wrapped.grad_stats_parallel_group = None if self._group else parallel_state.get_model_parallel_group()
        wrapped.tp_group = parallel_state.get_tensor_model_parallel_group()
        return wrapped

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        """Apply the gradients, and bring everybody the weights of all owners."""
        done: bool = super().step_with_ready_grads()
        if self._group is not None and self._group.size() > 1:
            self._gather_weights(self._group)
        return done

    def _gather_weights(self, group: dist.ProcessGroup) -> None:
        mine = self._owned_by[group.rank()]
        longest = max(sum(parameter.numel() for parameter in owned) for owned in self._owned_by)
        example = next(parameter for owned in self._owned_by for parameter in owned)
        flat = example.new_zeros(longest)
        if mine:
            torch.cat([parameter.detach().view(-1) for parameter in mine], out=flat[: sum(p.numel() for p in mine)])
        everything = example.new_empty(longest * group.size())
        dist.all_gather_into_tensor(everything, flat, group=group)
        for rank, owned in enumerate(self._owned_by):
            if rank == group.rank():
                continue
            sizes = [parameter.numel() for parameter in owned]
            pieces = torch.split(everything[rank * longest :][: sum(sizes)], sizes)
            for parameter, piece in zip(owned, pieces, strict=True):
                parameter.detach().copy_(piece.view_as(parameter))

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def sharded_state_dict(
        self, model_sharded_state_dict: Any, is_loading: bool = False, metadata: Any = None
    ) -> dict[str, Any]:
        """What a checkpoint holds of this optimizer, as megatron's sharded state dict."""
        weights, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
        sharded_as = {id(weight.data): weight for weight in nested_values(weights)}
        tensors = {}
        for name, model, key, value in self._tensors():
            tensor = make_sharded_optimizer_tensor(sharded_as[id(model)], value, prefix=f"optimizer.state.{key}")
            if self._group is not None:
                tensor.replica_id = (*tensor.replica_id[:2], 0)  # no other data-parallel rank has it
            tensors[f"{key}.{name}"] = tensor
        return {"tensors": tensors, "common": self._common()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `sharded_state_dict` described and a checkpoint filled in."""
        with torch.no_grad():
            for name, _, key, value in self._tensors():
                value.copy_(state_dict["tensors"][f"{key}.{name}"])
        common = state_dict["common"]
        for part, wrapped in zip(self._parts, self.chained_optimizers, strict=True):
            for group in part.optimizer.param_groups:
                if common["step"] is not None:
                    group["step"] = common["step"]
            if getattr(wrapped, "grad_scaler", None) is not None:
                wrapped.grad_scaler.load_state_dict(common["grad_scaler"])

    def _common(self) -> dict[str, Any]:
        groups = [group for part in self._parts for group in part.optimizer.param_groups]
        scalers = [wrapped.grad_scaler for wrapped in self.chained_optimizers if getattr(wrapped, "grad_scaler", None)]
        return {
            "step": next((group["step"] for group in groups if "step" in group), None),
            "grad_scaler": scalers[0].state_dict() if scalers else None,
        }

    def _tensors(self) -> Iterator[tuple[str, torch.nn.Parameter, str, torch.Tensor]]:
        """(parameter's name, parameter, kind of tensor, tensor) of all that this rank has to remember."""
        for part, models in zip(self._parts, self._models, strict=True):
            for group, parameters in zip(part.optimizer.param_groups, models, strict=True):
                for main, model in zip(group["params"], parameters, strict=True):
                    name, state = self._names[model], part.optimizer.state[main]
                    if main is not model:
                        yield name, model, "fp32_param", main
                    for key in part.state_keys:
                        if key not in state:
                            state[key] = torch.zeros_like(main)
                        yield name, model, key, state[key]


def grad_scaler(config: Any) -> Any:
    """megatron's dynamic loss scale for fp16 (arXiv 1710.03740, section 3.2), as `config` (megatron's) says."""
    return DynamicGradScaler(
        initial_scale=config.initial_loss_scale,
        min_scale=config.min_loss_scale,
        growth_factor=2.0,
        backoff_factor=0.5,
        growth_interval=config.loss_scale_window,
        hysteresis=config.hysteresis,
    )
