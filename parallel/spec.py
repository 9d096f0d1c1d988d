"""The transformer block's parts, plugged into megatron-core through its `ModuleSpec`s. No TransformerEngine needed."""

import copy
from typing import Any

from parallel.attention import PackedAttention
from parallel.engine import (
    IdentityOp,
    RowParallelLinear,
    TransformerBlockSubmodules,
    get_gpt_layer_local_spec,
    get_num_layers_to_build,
)
from parallel.kernels import swiglu
from parallel.norms import Norm


class AddingRowParallelLinear(RowParallelLinear):  # type: ignore[misc]
    """RowParallelLinear that adds its bias itself instead of handing it on to the residual's addition.

    When an MLP is recomputed, a bias that is handed on becomes an output of the recomputation: autograd then takes the
    parameter for a result of it and the backward pass calls itself without end.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "skip_bias_add": False})


def block_spec(config: Any, vp_stage: int | None = None) -> Any:
    """The layers of this pipeline stage (and virtual stage `vp_stage`) as a `TransformerBlockSubmodules`."""
    layer = copy.deepcopy(
        get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    )
    parts, attention = layer.submodules, layer.submodules.self_attention.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = Norm
    for name in ("q_layernorm", "k_layernorm"):
        if getattr(attention, name) is not IdentityOp:
            setattr(attention, name, Norm)
    parts.mlp.submodules.linear_fc2 = AddingRowParallelLinear
    if (
        config.use_te_activation_func
    ):  # megatron's name for: the activation is a submodule, and takes all of fc1's output
        parts.mlp.submodules.activation_func = swiglu.fused
    attention.core_attention = PackedAttention
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config, vp_stage), layer_norm=Norm)
