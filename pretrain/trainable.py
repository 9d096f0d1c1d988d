"""Trainable parts: which parameters a stage updates; the others are frozen.

A frozen parameter has no gradient from the moment the gradients are complete: it counts in no norm, is not decayed and
its moments stay as they are, so it is bit for bit what it was, under every layout. Its gradient is computed all the
same, since megatron-core reduces gradients in flat buffers.

    decoder.layers.3.mlp.linear_fc1.weight        names do not depend on the layout: layers count from 0 over the whole
    embedding.word_embeddings.weight              model, and an output head that is tied to the embedding is called so
"""

from collections.abc import Sequence
from typing import Any

import torch

from parallel import process_groups
from parallel.parameter_names import is_trainable, parameter_names
from pretrain.config import RunConfig
from pretrain.master_weights import master_weights
from pretrain.models.gpt import LanguageModel
from pretrain.name_patterns import check, trainable_patterns


def check_trainable(config: RunConfig, chunks: Sequence[LanguageModel]) -> None:
    """Raise ConfigError, on every process, for a pattern in a stage's `trainable` that matches no parameter."""
    patterns = list(trainable_patterns(config))
    if not patterns:
        return
    own = list(parameter_names(chunks).values())
    names = sorted({name for part in process_groups.gather_objects(own) for name in part})
    check(patterns, names)


def frozen(chunks: Sequence[Any], optimizer: Any, trainable: Sequence[str] | None) -> list[torch.Tensor]:
    """What the optimizer must leave alone on this process: what matches none of the patterns. None: nothing.

    Adam's moments are made for them too, where there are none: a checkpoint holds those of all parameters.
    """
    if trainable is None:
        return []
    for part in optimizer.chained_optimizers:
        if part.init_state_fn is not None:
            part.init_state_fn(part.optimizer, part.config)
    masters = {id(parameter): master for parameter, master in master_weights(optimizer)}
    return [
        masters.get(id(parameter), parameter)
        for parameter, name in parameter_names(chunks).items()
        if not is_trainable(name, trainable)
    ]
