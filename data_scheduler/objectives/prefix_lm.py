"""Prefix language modelling: where a document's prefix ends.

tokens    a b c d e f g h                the prefix is drawn to be 5 tokens
read      a b c d e                      no loss; each sees all five
predicted f g h                          each from all before it; the end of the document too
"""

import math

import numpy as np
import numpy.typing as npt

from data_scheduler.encoder import Encoder, Tokens
from data_scheduler.objectives.config import PrefixLmObjective
from data_scheduler.objectives.span_corruption import mode_id


def prefix_length(length: int, config: PrefixLmObjective, draw: np.uint64) -> int:
    """Tokens of the prefix of a document of `length` tokens; 0 where it has fewer than two and stays causal."""
    length = min(length, config.context_tokens)
    if length < 2:
        return 0
    least = min(max(1, math.ceil(config.min_share * length)), length - 1)
    most = max(least, min(math.floor(config.max_share * length), length - 1))
    return least + (int(draw) * (most - least + 1) >> 64)


class PrefixLm:
    """The objective with the tokenizer's ids."""

    def __init__(self, config: PrefixLmObjective, encoder: Encoder, source: str) -> None:
        """Raises ConfigError for a mode token that the tokenizer lacks."""
        self._config = config
        self._mode = np.array(mode_id(config.mode_token, encoder, source), np.uint32)

    def apply(self, tokens: Tokens, draws: npt.NDArray[np.uint64]) -> tuple[list[tuple[Tokens, bool]], int]:
        """(pieces of tokens and whether they are learned, tokens at the begin that see one another) of a document.

        draws: at least one random number where there are tokens.
        """
        length = prefix_length(len(tokens), self._config, draws[0]) if len(draws) else 0
        if not length:
            return [(tokens, True)], 0
        read = np.concatenate([self._mode, tokens[:length]])
        return [(read, False), (tokens[length:], True)], len(read) if self._config.bidirectional else 0
