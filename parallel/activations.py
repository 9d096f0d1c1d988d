"""What stands between an MLP's two matrix products: a bias where the model has them, and the activation.

    silu        gated: SwiGLU         silu(gate) · up
    gelu        gated: GeGLU          gelu(gate) · up          else  gelu(product + bias), the exact GELU
    gelu_tanh   likewise, with GELU's tanh approximation

Each by torch's operators, or by a fused one of `parallel/kernels/`. `set_activation` says which in megatron-core's
config, and `plug_activation` puts it into the MLPs' specs.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F

from parallel.engine import ColumnParallelLinear
from parallel.kernels import bias_gelu, geglu, swiglu

Activation = Literal["silu", "gelu", "gelu_tanh"]


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU's tanh approximation."""
    return F.gelu(x, approximate="tanh")


def geglu_tanh(gate_up: torch.Tensor) -> torch.Tensor:
    """Fused GeGLU with GELU's tanh approximation."""
    return geglu.fused(gate_up, "tanh")


FUNCTIONS: dict[Activation, Callable[..., torch.Tensor]] = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": gelu_tanh}
FUSED_GATED = {F.silu: swiglu.fused, F.gelu: geglu.fused, gelu_tanh: geglu_tanh}


class BiasGeluLinear(ColumnParallelLinear):  # type: ignore[misc]
    """fc1 of an MLP with biases and without gates, which applies its bias and GELU in one operator.

    megatron-core's MLP adds the bias that fc1 hands it before it calls an activation; from this it gets none.
    """

    def forward(self, *inputs: Any, **named: Any) -> tuple[torch.Tensor, None]:
        """[tokens, 1, hidden_size] → ([tokens, 1, ffn_hidden_size / tp], no bias)."""
        product, bias = super().forward(*inputs, **named)
        approximate: bias_gelu.Approximate = "tanh" if self.config.activation_func is gelu_tanh else "none"
        return bias_gelu.fused(product, bias, approximate), None


def _as_it_is(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


def set_activation(config: Any, activation: Activation, fused: bool) -> None:
    """Note in megatron-core's `TransformerConfig` how its MLPs compute `activation`.

    `use_te_activation_func` has nothing to do with TransformerEngine here. It is megatron's name for: the activation is
    a submodule, and takes all of fc1's output.
    """
    config.activation_func = FUNCTIONS[activation]
    config.use_te_activation_func = fused


def plug_activation(config: Any, submodules: Sequence[Any]) -> None:
    """Put what `set_activation` noted into the specs of a layer's MLPs, `MLPSubmodules`."""
    if not config.use_te_activation_func:
        return
    for each in submodules:
        if config.gated_linear_unit:
            each.activation_func = FUSED_GATED[config.activation_func]
        else:
            each.linear_fc1, each.activation_func = BiasGeluLinear, _as_it_is
