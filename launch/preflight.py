"""What can be known to be wrong before any process starts."""

from collections.abc import Sequence
from pathlib import Path

from parallel.layout import Layout, validate
from pretrain.config import RunConfig, load_config
from pretrain.models.sizes import layout_shape


def checked_config(path: str | Path, overrides: Sequence[str], world_size: int) -> RunConfig:
    """The configuration, held against a layout of `world_size` processes; raises ConfigError, LayoutError."""
    config = load_config(path, overrides)
    layout = Layout(world_size, **config.parallel.model_dump())
    # A vocabulary that comes with the tokenizer is padded later; it is not this check's business.
    vocab_size = config.model.vocab_size or 128 * layout.tensor_parallel_size
    validate(layout, layout_shape(config, vocab_size))
    return config
