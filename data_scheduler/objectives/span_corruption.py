"""Span corruption for a decoder: the text without its spans first, then the spans.

Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", arXiv 1910.10683,
section 3.1.4, with the lengths of its code (`random_spans_noise_mask`): of n tokens round(n · rate) are taken out, in
round(of those / mean span) spans; their lengths and those of the stretches between them are uniform among all ways to
divide so many tokens by so many. The text begins with a stretch that stays and ends with a span:

    tokens    a b c d e f g h                spans c d and h (rate 3/8, mean span 1.5)
    input     a b <0> e f g <1>              no loss
    target    <0> c d <1> h e                loss; the last e ends the document

A decoder has no other mark of where the input ends than the first sentinel, which stands for the second time there.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_scheduler.encoder import Encoder, Tokens
from data_scheduler.objectives.config import SpanCorruptionObjective
from data_scheduler.order import Int64
from headrace.errors import ConfigError


class Spans(NamedTuple):
    """How many tokens are taken out, in how many spans."""

    noise: int
    number: int


def spans_of(length: int, rate: float, mean_span: float) -> Spans:
    """Of `length` tokens; (0, 0) where none can be taken out so that one stays before every span."""
    noise = min(int(length * rate + 0.5), length - 1)
    if noise < 1:
        return Spans(0, 0)
    return Spans(noise, min(max(1, int(noise / mean_span + 0.5)), noise, length - noise))


def piece_tokens(config: SpanCorruptionObjective) -> int:
    """The most tokens that become at most `context_tokens`: mode token, two sentinels a span, and the closing token."""
    room = config.context_tokens - 1 - (config.mode_token is not None)
    return next(n for n in range(room, 0, -1) if n + 2 * spans_of(n, config.rate, config.mean_span).number <= room)


def mode_id(name: str | None, encoder: Encoder, source: str) -> list[int]:
    """The id of a mode token, none without a name. Raises ConfigError when the tokenizer has no such special token."""
    if name is None:
        return []
    number = encoder.special_id(name)
    if number is None:
        raise ConfigError(
            f"source {source!r}: objectives: the mode token {name!r} is no special token of the tokenizer; train "
            "one with `headrace tokenizer train --special-token`, or name another, or null for none"
        )
    return [number]


def find_sentinels(config: SpanCorruptionObjective, encoder: Encoder, source: str) -> list[int]:
    """Ids of as many sentinels as a piece may need. Raises ConfigError when the tokenizer has fewer."""
    # The number of spans does not fall with the length: noise does not, and neither does what stays.
    needed = spans_of(piece_tokens(config), config.rate, config.mean_span).number
    found: list[int] = []
    while len(found) < needed:
        number = encoder.special_id(config.sentinel.format(len(found)))
        if number is None:
            raise ConfigError(
                f"source {source!r}: objectives: span_corruption at rate {config.rate:g} with mean_span "
                f"{config.mean_span:g} takes up to {needed} sentinels for {config.context_tokens} tokens, the "
                f"tokenizer has {len(found)} special tokens {config.sentinel}; train one with `headrace tokenizer "
                "train --special-token`, name its own as `sentinel`, or lower context_tokens"
            )
        found.append(number)
    return found


def corrupt(tokens: Tokens, spans: Spans, sentinels: list[int], draws: npt.NDArray[np.uint64]) -> tuple[Tokens, Tokens]:
    """(input, target) of a piece, uint32 each; `draws` are as many random numbers as it has tokens."""
    stays = _divide(len(tokens) - spans.noise, spans.number, draws[spans.noise :])
    taken = _divide(spans.noise, spans.number, draws[: spans.noise])
    marks, of = np.array(sentinels[: spans.number], np.uint32), np.arange(spans.number)
    is_taken = np.repeat(np.arange(2 * spans.number) % 2 == 1, np.stack([stays, taken], axis=1).reshape(-1))
    left = np.empty(len(tokens) - spans.noise + spans.number, np.uint32)
    left[np.cumsum(stays) + of] = marks
    left[np.arange(len(tokens) - spans.noise) + of.repeat(stays)] = tokens[~is_taken]
    out = np.empty(spans.noise + spans.number, np.uint32)
    out[np.cumsum(taken) - taken + of] = marks
    out[np.arange(spans.noise) + of.repeat(taken) + 1] = tokens[is_taken]
    return left, out


def _divide(total: int, parts: int, draws: npt.NDArray[np.uint64]) -> Int64:
    """`total` as `parts` numbers of at least 1, uniform among all ways, int64[parts]."""
    cuts = np.sort(draws[: total - 1].argsort(kind="stable")[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]])).astype(np.int64)


class SpanCorruption:
    """The objective with the tokenizer's ids."""

    def __init__(self, config: SpanCorruptionObjective, encoder: Encoder, source: str) -> None:
        """Raises ConfigError for tokens that the tokenizer lacks."""
        self._config, self._eos = config, encoder.eos_id
        self._sentinels = find_sentinels(config, encoder, source)
        self._size = piece_tokens(config)
        self._mode = mode_id(config.mode_token, encoder, source)

    def apply(self, tokens: Tokens, draws: npt.NDArray[np.uint64]) -> tuple[list[tuple[Tokens, bool]], int]:
        """(pieces of tokens and whether they are learned, tokens at the begin that see one another) of a document.

        A piece of which nothing can be taken out, because it is too short for the rate, stays as it is and is learned
        whole. draws: as many random numbers as there are tokens.
        """
        pieces: list[tuple[Tokens, bool]] = []
        seen = 0
        for at in range(0, len(tokens), self._size):
            piece = tokens[at : at + self._size]
            closing = [] if at + len(piece) == len(tokens) else [self._eos]  # the last one's end is the document's
            spans = spans_of(len(piece), self._config.rate, self._config.mean_span)
            if not spans.number:
                pieces.append((_with(piece, [], closing), True))
                continue
            left, out = corrupt(piece, spans, self._sentinels, draws[at : at + len(piece)])
            read = _with(left, self._mode, [])
            pieces += [(read, False), (_with(out, [], closing), True)]
            if at == 0 and self._config.bidirectional:
                seen = len(read)
        return pieces, seen


def _with(tokens: Tokens, before: list[int], after: list[int]) -> Tokens:
    return np.concatenate([np.array(before, np.uint32), tokens, np.array(after, np.uint32)]).astype(np.uint32)
