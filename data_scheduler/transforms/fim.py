"""Fill in the middle: cutting a document and putting its middle last.

Bavarian et al., "Efficient Training of Language Models to Fill in the Middle", arXiv 2207.14255, section 3: cut at two
places chosen uniformly among the character boundaries, each piece encoded by itself, the sentinels as ids:

    PSM    <PRE> prefix <SUF> suffix <MID> middle
    SPM    <PRE> <SUF> suffix <MID> prefix middle       (the variant of its appendix D, which shares PSM's beginning)

The paper prefers to cut after documents were cut into contexts ("context-level"), so that no context holds half of a
transformed document. Sequences here are cut from tokens that are packed full, without padding, and a transformed
document is longer than before; so a long document is cut into contexts of characters ahead of that.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_scheduler.encoder import Encoder
from data_scheduler.transforms.chance import is_drawn
from data_scheduler.transforms.config import FimTransform
from headrace.errors import ConfigError

FAMILIES = (
    ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),  # Qwen, CodeGemma; `headrace tokenizer train`
    ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"),  # StarCoder
    ("<｜fim▁begin｜>", "<｜fim▁end｜>", "<｜fim▁hole｜>"),  # DeepSeek: the suffix stands behind the hole
)
"""(prefix, middle, suffix) as known tokenizers call them."""
DRAWS = 4
"""Random numbers that a document takes: whether, which order, and two places."""

Parts = list[str | int]
"""Text, and ids of special tokens between it."""


class Sentinels(NamedTuple):
    """Ids of the special tokens."""

    prefix: int
    middle: int
    suffix: int


def find_sentinels(config: FimTransform, encoder: Encoder, source: str) -> Sentinels:
    """The tokenizer's sentinels. Raises ConfigError when it lacks one."""
    asked = (config.prefix_token, config.middle_token, config.suffix_token)
    if asked[0] is None:
        for names in FAMILIES:
            ids = [encoder.special_id(name) for name in names]
            if None not in ids:
                return Sentinels(*(number for number in ids if number is not None))
        raise ConfigError(
            f"source {source!r}: fim needs special tokens for prefix, middle and suffix, and the tokenizer "
            f"has neither {FAMILIES[0][0]} nor {FAMILIES[1][0]}; name its own as prefix_token, middle_token and "
            "suffix_token, or train one with `headrace tokenizer train --special-token`"
        )
    return Sentinels(*(special_id(name or "", encoder, source, "fim") for name in asked))


def special_id(name: str, encoder: Encoder, source: str, kind: str) -> int:
    """The id of a special token. Raises ConfigError when there is none of that name."""
    number = encoder.special_id(name)
    if number is None:
        raise ConfigError(
            f"source {source!r}: transforms: {kind} names {name!r}, which is no special token of the tokenizer; train "
            "one with `headrace tokenizer train --special-token`"
        )
    return number


def rearrange(text: str, config: FimTransform, sentinels: Sentinels, draws: npt.NDArray[np.uint64]) -> Parts:
    """A document's or context's text in the order that its four `draws` say."""
    if not is_drawn(draws[0], config.rate):
        return [text]
    # Upper bits of a 64-bit number times the count: uniform to 1 in 2⁴⁰ for texts of 16 M characters.
    first, second = sorted(int(draw) * (len(text) + 1) >> 64 for draw in draws[2:4])
    prefix, middle, suffix = text[:first], text[first:second], text[second:]
    if is_drawn(draws[1], config.spm_rate):
        parts: Parts = [sentinels.prefix, sentinels.suffix, suffix, sentinels.middle, prefix, middle]
    else:
        parts = [sentinels.prefix, prefix, sentinels.suffix, suffix, sentinels.middle, middle]
    return [part for part in parts if part != ""]


def contexts(text: str, size: int | None) -> list[str]:
    """The text in pieces of `size` characters, the last with what is left; whole where there is no size."""
    if size is None or len(text) <= size:
        return [text]
    return [text[at : at + size] for at in range(0, len(text), size)]
