"""A run's configuration: YAML in, one validated `RunConfig` out.

`load_config("recipes/quickstart.yaml", ["train.steps=20"])` reads the file, applies dotted overrides, and raises
`ConfigError` with the key's path and the nearest valid name when anything does not fit. The sections stand in
`model.py`, `training.py` and `services.py`, the whole in `run.py`, what reads it in `load.py`.
"""

from pretrain.config.load import config_schema, dump_config, load_config, load_data_config, validate_config
from pretrain.config.model import KernelsConfig, ModelConfig
from pretrain.config.run import RunConfig, RunSection, RunStage
from pretrain.config.services import (
    ControlConfig,
    DynamicsConfig,
    MetricsConfig,
    MonitorConfig,
    PrometheusConfig,
    WandbConfig,
)
from pretrain.config.training import (
    CheckpointConfig,
    OptimizerConfig,
    ParallelConfig,
    ParameterGroup,
    SelectionConfig,
    TrainConfig,
)

__all__ = [
    "CheckpointConfig",
    "ControlConfig",
    "DynamicsConfig",
    "KernelsConfig",
    "MetricsConfig",
    "ModelConfig",
    "MonitorConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ParameterGroup",
    "PrometheusConfig",
    "RunConfig",
    "RunSection",
    "RunStage",
    "SelectionConfig",
    "TrainConfig",
    "WandbConfig",
    "config_schema",
    "dump_config",
    "load_config",
    "load_data_config",
    "validate_config",
]
