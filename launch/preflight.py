"""What can be known to be wrong before any process starts."""

from collections.abc import Sequence
from pathlib import Path

from pretrain.config import RunConfig, load_config
from pretrain.layouts import VOCAB_MULTIPLE, layouts_ahead, tensor_parallel_multiple


def checked_config(path: str | Path, overrides: Sequence[str], world_size: int) -> RunConfig:
    """The configuration, held against a layout of `world_size` processes; raises ConfigError, LayoutError."""
    config = load_config(path, overrides)
    # A vocabulary that comes with the tokenizer is padded later; it is not this check's business.
    layouts_ahead(config, world_size, config.model.vocab_size or VOCAB_MULTIPLE * tensor_parallel_multiple(config))
    return config
