"""muP, the maximal update parametrisation: one learning rate for every width (Yang et al., Tensor Programs V, arXiv
2203.03466, table 8).

With m = hidden_size / mup_base_hidden_size, against the usual parametrisation:

    weight                        start         AdamW's lr    SGD's lr    Muon's lr    what it gives is multiplied by
    embeddings, norms, biases     1             1             m           1            1
    output head                   1             1             m           1            1/m
    matrices of the blocks        std / √m      1/m           1           1/√m         1

and attention is softmax(q·k·√mup_base_head_size / head_size), so 1/d instead of 1/√d. At the base width all factors
are 1. The MLP and the heads are taken to grow with the width. Tied embeddings fit: their two rows differ in the
multiplier alone. Weight decay is divided by what the learning rate is multiplied with, so that their product, the
share of the weights that a step takes off, does not change with the width either.

Muon is not in the paper. Its update has singular values of 0.2·√max(rows, columns), which grow with √m where the width
asks for none; hence 1/√m. Its AdamW part follows AdamW's column.
"""

import math
from functools import partial
from typing import Any

import torch

from headrace.errors import ConfigError
from parallel.parameter_names import BLOCKS, HEADS, is_block_matrix
from pretrain.config import ModelConfig


def width_ratio(config: ModelConfig) -> float:
    """m: how many times as wide as the base the model is; 1 without muP."""
    return config.hidden_size / config.mup_base_hidden_size if config.mup else 1.0


def std_factor(config: ModelConfig, key: str) -> float:
    """Factor of the standard deviation at the start of the matrix called `key` in checkpoints."""
    return 1.0 / math.sqrt(width_ratio(config)) if key.startswith((BLOCKS, HEADS)) else 1.0


def lr_factor(config: ModelConfig, kind: str, name: str, parameter: torch.Tensor) -> float:
    """Factor of the learning rate of the parameter called `name` under the optimizer `kind`. Raises ConfigError."""
    if config.mup and ".router." in name:
        raise ConfigError("model.mup: there is no rule for the router of a mixture of experts; set it to false")
    ratio = width_ratio(config)
    if is_block_matrix(name, parameter):
        return {"adamw": 1.0 / ratio, "sgd": 1.0, "muon": 1.0 / math.sqrt(ratio)}[kind]
    return ratio if kind == "sgd" else 1.0


def attention_scale(config: ModelConfig) -> float | None:
    """Factor of q·k; None: the usual 1/√head_size."""
    if not config.mup:
        return None
    return math.sqrt(config.mup_base_head_size) / (config.hidden_size // config.num_attention_heads)


def scale_logits(output_layer: torch.nn.Module, config: ModelConfig) -> None:
    """Let `output_layer` give 1/m of its product: its input is scaled, which has fewer numbers than the logits."""
    if config.mup:
        output_layer.register_forward_pre_hook(partial(_scale_input, 1.0 / width_ratio(config)))


def _scale_input(factor: float, module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return inputs[0] * factor, *inputs[1:]
