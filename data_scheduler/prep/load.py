"""From a YAML file to a `PrepConfig`, with errors that name line, key and the nearest valid name."""

from pathlib import Path

from data_scheduler.prep.config import PrepConfig
from headrace.validation import validated
from headrace.yaml_file import read_yaml


def load_prep_config(path: str | Path) -> PrepConfig:
    """The validated configuration. Raises ConfigError: `prep.yaml:12: unknown key steps.0.langs (did you mean …)`."""
    file = read_yaml(path)
    raw = file.mapping(list(PrepConfig.model_fields))
    return validated(PrepConfig, raw, lambda location: f"{path}:{file.line(location)}")
