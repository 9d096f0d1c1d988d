"""Patterns over the names of parameters, in `optimizer.groups` and in stages' `trainable`: each must match one."""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from headrace.errors import ConfigError
from pretrain.config import OptimizerConfig, RunConfig


def check_patterns(config: RunConfig, names: Sequence[str]) -> None:
    """Raise ConfigError for a pattern of `config` that none of `names`, all of the model's parameters, matches."""
    check(group_patterns(config.optimizer), names)
    check(trainable_patterns(config), names)


def group_patterns(config: OptimizerConfig) -> Iterator[tuple[str, str]]:
    """(key, pattern) of every group of parameters."""
    for number, group in enumerate(config.groups):
        yield f"optimizer.groups.{number}.match", group.match


def trainable_patterns(config: RunConfig) -> Iterator[tuple[str, str]]:
    """(key, pattern) of every stage's trainable parts."""
    for number, stage in enumerate(config.stages):
        for pattern in stage.trainable or ():
            yield f"stages.{number}.trainable", pattern


def check(patterns: Iterable[tuple[str, str]], names: Sequence[str]) -> None:
    """Raise ConfigError for the first of `patterns`, (key, pattern), that matches none of `names`."""
    for key, pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = ", ".join(_nearest(pattern, names))
            raise ConfigError(f"{key}: no parameter is called {pattern!r}; the nearest are {near}")


def _nearest(pattern: str, names: Sequence[str]) -> list[str]:
    """Up to three names, of parameters that all layers have only those of one layer."""
    different = {re.sub(r"\.\d+\.", ".", name): name for name in sorted(names, reverse=True)}
    plain = re.sub(r"\.\d+(?=\.|$)|[*?\[\]]", "", pattern)
    return [different[name] for name in difflib.get_close_matches(plain, sorted(different), n=3, cutoff=0.0)]
