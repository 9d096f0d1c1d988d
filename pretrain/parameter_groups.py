"""Which parameters share a learning rate and a weight decay: the default rule, and `optimizer.groups`."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch

from parallel import process_groups
from parallel.engine import ParamKey, ParamWithNamePredicate
from pretrain.config import ModelConfig, OptimizerConfig
from pretrain.models.mup import lr_factor
from pretrain.name_patterns import check, group_patterns


class Factors(NamedTuple):
    """What a parameter's settings are multiplied with."""

    lr: float
    weight_decay: float


def factors(config: OptimizerConfig, model: ModelConfig, name: str, parameter: torch.Tensor) -> Factors:
    """Of the parameter called `name`: no decay for norms and biases, unless one of `config.groups` says otherwise, and
    what muP asks for besides."""
    own = Factors(1.0, 1.0 if parameter.dim() > 1 else 0.0)
    for group in config.groups:
        if fnmatchcase(name, group.match):
            decay = own.weight_decay
            if group.weight_decay is not None:
                decay = group.weight_decay / config.weight_decay if group.weight_decay else 0.0
            own = Factors(group.lr_scale, decay)
            break
    scale = lr_factor(model, config.kind, name, parameter)
    return Factors(own.lr * scale, own.weight_decay / scale)


def overrides(
    config: OptimizerConfig, model: ModelConfig, names: Mapping[torch.nn.Parameter, str]
) -> dict[Any, dict[str, float]]:
    """The rule as megatron-core takes it: for each kind of parameter a key that knows its own, and its settings.

    `names` are those of this process's parameters. Every process calls this. Raises ConfigError on all of them for a
    pattern of `config.groups` that no parameter of the whole model has.
    """
    _check_patterns(config, names)
    own = {parameter: factors(config, model, name, parameter) for parameter, name in names.items()}
    return {
        ParamKey(with_name_predicate=_has(kind, own)): {"lr_mult": kind.lr, "wd_mult": kind.weight_decay}
        for kind in dict.fromkeys(own.values())
    }


def _has(kind: Factors, own: Mapping[torch.nn.Parameter, Factors]) -> Any:
    return ParamWithNamePredicate(str(kind), lambda parameter, _: own[parameter] == kind)


def _check_patterns(config: OptimizerConfig, names: Mapping[torch.nn.Parameter, str]) -> None:
    if not config.groups:
        return
    known = sorted({name for part in process_groups.gather_objects(list(names.values())) for name in part})
    check(group_patterns(config), known)
