"""YAML in, a validated configuration out, and back."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from data_scheduler.config import DataConfig, StrictModel
from headrace.errors import ConfigError
from headrace.validation import validated
from headrace.yaml_file import dump_yaml, parse_yaml, read_yaml
from pretrain.config.run import RunConfig


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The validated configuration of `path` with `key.path=value` overrides applied.

    Values are read as YAML (`true`, `3e-4`, `[a, b]`); list items are addressed by number or, for sources, by name
    (`data.sources.code.weight=2`). Raises ConfigError.
    """
    return validate_config(_read(path, overrides), str(path))


def load_data_config(path: str | Path, overrides: Sequence[str] = ()) -> tuple[DataConfig, int | None]:
    """(the `data` section, `train.steps`) of a run's configuration, or of a file with a `data` section only, which has
    no steps. Otherwise as `load_config`."""
    raw = _read(path, overrides)
    if set(raw) != {"data"}:
        config = validate_config(raw, str(path))
        return config.data, config.train.steps
    return validated(_DataFile, raw, str(path)).data, None


class _DataFile(StrictModel):
    data: DataConfig


def _read(path: str | Path, overrides: Sequence[str]) -> dict[str, Any]:
    raw = read_yaml(path).mapping(list(RunConfig.model_fields))
    for override in overrides:
        _apply_override(raw, override)
    return raw


def validate_config(raw: dict[str, Any], where: str) -> RunConfig:
    """`raw` as a RunConfig; raises ConfigError naming `where`, the key's path and the nearest valid name."""
    return validated(RunConfig, raw, where)


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML; reading it back gives an equal object."""
    return dump_yaml(config.model_dump(mode="json", exclude={"data": {"stages"}} if config.stages else None))


def config_schema() -> str:
    """JSON schema of a run's configuration."""
    return json.dumps(RunConfig.model_json_schema(), indent=2)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r}: write key.path=value")
    try:
        value = parse_yaml(text) if text else ""
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from None
    parts = key.split(".")
    node: Any = raw
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            names = [item.get("name") if isinstance(item, dict) else None for item in node]
            index = names.index(part) if part in names else int(part) if part.isdecimal() else -1
            if not 0 <= index < len(node):
                known = ", ".join(str(name) for name in names if name) or f"0 to {len(node) - 1}"
                raise ConfigError(
                    f"override {override!r}: no item {part!r} in {'.'.join(parts[:depth])}; it has {known}"
                )
            if last:
                node[index] = value
            else:
                node = node[index]
        elif isinstance(node, dict):
            if last:
                node[part] = value
            else:
                if node.get(part) is None:
                    node[part] = {}
                node = node[part]
        else:
            raise ConfigError(f"override {override!r}: {'.'.join(parts[:depth])} is a single value, not a section")
