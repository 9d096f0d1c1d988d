"""How many rows the embedding has."""

import math

from headrace.errors import ConfigError
from pretrain.config import RunConfig

VOCAB_MULTIPLE = 128
"""Embedding rows are padded to a multiple of this: whole tensor-core tiles, and divisible by tensor-parallel sizes."""


def padded_vocab_size(config: RunConfig, tokens: int) -> int:
    """Embedding rows: the configured number, or the tokenizer's rounded up to VOCAB_MULTIPLE · tensor parallel size."""
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    stages = [stage.parallel for stage in config.stages if stage.parallel is not None]
    multiple = VOCAB_MULTIPLE * math.lcm(*(each.tensor_parallel_size for each in (config.parallel, *stages)))
    return -(-tokens // multiple) * multiple


def check_vocabulary(vocab_size: int, tokens: int) -> None:
    """Raise ConfigError when the tokenizer makes ids the embedding has no row for."""
    if vocab_size < tokens:
        raise ConfigError(f"model.vocab_size is {vocab_size} but the tokenizer has {tokens} tokens")
