"""The transformer block's parts, plugged into megatron-core through its `ModuleSpec`s. No TransformerEngine needed."""

import copy
from typing import Any

import torch

from parallel.activations import plug_activation
from parallel.attention import PackedAttention
from parallel.engine import (
    IdentityOp,
    RowParallelLinear,
    TopKRouter,
    TransformerBlockSubmodules,
    get_gpt_layer_local_spec,
    get_num_layers_to_build,
)
from parallel.norms import FusedNorm, Norm
from parallel.residual_layer import ResidualNormLayer
from parallel.self_attention import FusedSelfAttention


class AddingRowParallelLinear(RowParallelLinear):  # type: ignore[misc]
    """RowParallelLinear that adds its bias itself instead of handing it on to the residual's addition.

    When an MLP is recomputed, a bias that is handed on becomes an output of the recomputation: autograd then takes the
    parameter for a result of it and the backward pass calls itself without end.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "skip_bias_add": False})


class BalancedRouter(TopKRouter):  # type: ignore[misc]
    """TopKRouter whose load-balancing loss weighs the same however many ranks share a micro-batch's tokens.

    Under sequence and context parallelism each rank adds its own part of the loss. Since gradients are divided by all
    tokens of the global batch at the end, the parts must be multiplied by the tokens of the whole micro-batch;
    megatron-core 0.16.1 takes the rank's own, which makes the loss as many times too small as there are ranks.
    """

    def attach_and_log_load_balancing_loss(
        self,
        activation: torch.Tensor,
        aux_loss_coeff: float,
        aux_loss: torch.Tensor,
        aux_loss_name: str,
        reduce_group: torch.distributed.ProcessGroup,
        reduce_group_has_dp: bool = False,
        valid_token_count: int | torch.Tensor | None = None,
    ) -> torch.Tensor:
        tokens = activation.size(0) if valid_token_count is None else valid_token_count
        scaled: torch.Tensor = super().attach_and_log_load_balancing_loss(
            activation,
            aux_loss_coeff,
            aux_loss,
            aux_loss_name,
            reduce_group,
            reduce_group_has_dp,
            tokens * reduce_group.size(),
        )
        return scaled


def block_spec(config: Any, vp_stage: int | None = None, fused_norms: bool = False) -> Any:
    """The layers of this pipeline stage (and virtual stage `vp_stage`) as a `TransformerBlockSubmodules`.

    With `fused_norms` blocks add and normalise in one pass, see `parallel/residual_layer.py`.
    """
    experts = config.num_moe_experts
    layer = copy.deepcopy(
        get_gpt_layer_local_spec(
            num_experts=experts, qk_layernorm=config.qk_layernorm, normalization=config.normalization
        )
    )
    parts, attention = layer.submodules, layer.submodules.self_attention.submodules
    norm = FusedNorm if fused_norms else Norm
    parts.input_layernorm = parts.pre_mlp_layernorm = norm
    if fused_norms:
        layer.module = ResidualNormLayer
    for name in ("q_layernorm", "k_layernorm"):
        if getattr(attention, name) is not IdentityOp:
            setattr(attention, name, Norm)
    mlp = parts.mlp.submodules
    if experts is None:
        mlp.linear_fc2 = AddingRowParallelLinear
        mlps = [mlp]
    else:
        mlp.router = BalancedRouter
        mlps = [mlp.experts.submodules, mlp.shared_experts.submodules]
    plug_activation(config, mlps)
    attention.core_attention = PackedAttention
    if getattr(config, "fused_qk_norm_rope", False):
        parts.self_attention.module = FusedSelfAttention
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config, vp_stage), layer_norm=norm)


def mark_experts(chunk: Any) -> None:
    """Have megatron-core treat the experts of a model chunk as split over ranks, also where one rank holds them all.

    Otherwise it takes their weights for dense ones as soon as expert_parallel_size is 1: it then makes one optimizer
    instead of two, and an optimizer state saved with one number of optimizers cannot be loaded with the other.
    """
    for name, parameter in chunk.named_parameters():
        if ".experts.local_experts." in name:
            parameter.allreduce = False


def dispatchers(chunk: Any) -> list[Any]:
    """What hands tokens to experts in a model chunk, one for each layer of experts."""
    return [module.token_dispatcher for module in chunk.modules() if hasattr(module, "token_dispatcher")]


def forget_tokens(dispatcher: Any) -> None:
    """Let go of the last micro-batch that a dispatcher has seen; after its backward pass.

    megatron-core keeps its probabilities, and with them its autograd graph. That leads to the parameters, to the hooks
    of data parallelism on them and back to the model, by ways that Python's collector does not see: such a model would
    never be freed.
    """
    for name, value in vars(dispatcher).items():
        if torch.is_tensor(value) and value.grad_fn is not None:
            setattr(dispatcher, name, None)
