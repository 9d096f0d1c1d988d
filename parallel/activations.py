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

from parallel.engine import MLP
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


class BiasGeluMLP(MLP):  # type: ignore[misc]
    """megatron-core's MLP of a model with biases and without gates, with fc1's bias and GELU in one operator."""

    def forward(
        self, hidden_states: torch.Tensor, per_token_scale: torch.Tensor | None = None, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`hidden_states` [tokens, 1, hidden_size] → (the same shape, fc2's bias if it leaves that to the caller)."""
        assert per_token_scale is None, "experts have no biases"
        product, bias = self.linear_fc1(hidden_states)
        approximate: bias_gelu.Approximate = "tanh" if self.config.activation_func is gelu_tanh else "none"
        output, output_bias = self.linear_fc2(bias_gelu.fused(product, bias, approximate))
        return output, output_bias


def set_activation(config: Any, activation: Activation, fused: bool) -> None:
    """Note in megatron-core's `TransformerConfig` how its MLPs compute `activation`.

    Two of its switches say it; neither has anything to do here with what it would do by itself, TransformerEngine and
    torch.compile (whose fused bias and GELU is the tanh approximation whatever the model asks for).
    """
    config.activation_func = FUNCTIONS[activation]
    config.use_te_activation_func = fused and config.gated_linear_unit
    config.bias_activation_fusion = fused and not config.gated_linear_unit


def plug_activation(config: Any, mlp: Any, submodules: Sequence[Any]) -> None:
    """Put what `set_activation` noted into a layer's spec `mlp`, of whose MLPs these are the `submodules`."""
    if config.use_te_activation_func:
        # megatron's name for: the activation is a submodule, and takes all of fc1's output
        for each in submodules:
            each.activation_func = FUSED_GATED[config.activation_func]
    if config.bias_activation_fusion:
        mlp.module = BiasGeluMLP
