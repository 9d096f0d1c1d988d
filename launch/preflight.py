"""What can be known to be wrong before any process starts."""

from collections.abc import Sequence
from pathlib import Path

from pretrain.config import RunConfig, load_config
from pretrain.layouts import layouts_ahead
from pretrain.models.vocabulary import padded_vocab_size


def checked_config(path: str | Path, overrides: Sequence[str], world_size: int) -> RunConfig:
    """The configuration, held against a layout of `world_size` processes; raises ConfigError, LayoutError."""
    config = load_config(path, overrides)
    # A vocabulary that comes with the tokenizer is padded later; it is not this check's business.
    layouts_ahead(config, world_size, padded_vocab_size(config, 1))
    return config
