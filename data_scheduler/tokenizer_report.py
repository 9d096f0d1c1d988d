"""How well a tokenizer fits each source: the three numbers of Nyonic's Figure 3 (arXiv 2404.15702).

- **compression rate**: bytes of UTF-8 text per token (higher is better); bytes, because characters carry more in some
  scripts than in others.
- **fertility**: mean number of tokens per word (1 is best).
- **proportion of continued words**: share of words that are split into at least two tokens (0 is best).

The last two are those of Rust et al., "How Good is Your Tokenizer?" (ACL 2021, arXiv 2012.15613), who count over the
words of treebanks. Here words stand in their running text, as training sees them: a word is a maximal run of letters,
combining marks, digits and underscores, and the tokens of a word are those that cover any part of it, such as `" the"`
for `the`. In scripts written without spaces a "word" is what stands between punctuation, so compare tokenizers there,
not sources.
"""

import re
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from data_scheduler.encoder import HuggingFaceEncoder, SentencePieceEncoder, as_text, load_encoder

Spans = npt.NDArray[np.int64]


class Segmenter(Protocol):
    """Where each token of a text begins and ends: int64[n, 2] in characters, in order of appearance."""

    vocab_size: int

    def spans(self, text: str) -> Spans: ...


class Fit(NamedTuple):
    """Counts over one source; the three numbers follow from them."""

    documents: int
    bytes: int
    tokens: int
    words: int
    word_tokens: int
    """Tokens that cover part of a word, counted once for each word they cover."""
    continued_words: int
    """Words of two or more tokens."""

    @property
    def compression_rate(self) -> float:
        """Bytes per token; NaN without tokens."""
        return self.bytes / self.tokens if self.tokens else float("nan")

    @property
    def fertility(self) -> float:
        """Tokens per word; NaN without words."""
        return self.word_tokens / self.words if self.words else float("nan")

    @property
    def continued(self) -> float:
        """Proportion of continued words; NaN without words."""
        return self.continued_words / self.words if self.words else float("nan")


class _HuggingFaceSegmenter:
    def __init__(self, encoder: HuggingFaceEncoder) -> None:
        self.vocab_size = encoder.vocab_size
        self._tokenizer = encoder.tokenizer

    def spans(self, text: str) -> Spans:
        offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return np.array(offsets, np.int64).reshape(-1, 2)


class _SentencePieceSegmenter:
    def __init__(self, encoder: SentencePieceEncoder) -> None:
        self.vocab_size = encoder.vocab_size
        self._processor = encoder.processor

    def spans(self, text: str) -> Spans:
        pieces = self._processor.encode(text, out_type="immutable_proto").pieces
        return np.array([(piece.begin, piece.end) for piece in pieces], np.int64).reshape(-1, 2)


def load_segmenter(path: str | Path) -> Segmenter:
    """The tokenizer at `path` (as for `load_encoder`, same errors), asked for token boundaries instead of ids."""
    encoder = load_encoder(path, fast=False)
    if isinstance(encoder, SentencePieceEncoder):
        return _SentencePieceSegmenter(encoder)
    assert isinstance(encoder, HuggingFaceEncoder)
    return _HuggingFaceSegmenter(encoder)


@cache
def word_pattern() -> re.Pattern[str]:
    """Letters, digits, underscore, combining marks; Python's `\\w` lacks the marks, which would cut Hindi words up."""
    marks = (chr(c) for c in range(min(sys.maxunicode, 0x20000)) if unicodedata.category(chr(c))[0] == "M")
    return re.compile(f"[\\w{''.join(marks)}]+")


def measure(segmenter: Segmenter, texts: Iterable[str]) -> Fit:
    """Count tokens and words over `texts`."""
    counts = np.zeros(6, np.int64)
    for raw in texts:
        text = as_text(raw)
        spans = segmenter.spans(text)
        words = np.array([match.span() for match in word_pattern().finditer(text)], np.int64).reshape(-1, 2)
        counts[:3] += 1, len(text.encode()), len(spans)
        # Tokens come in order, so those that overlap a word [b, e) are those that begin before e less those that end
        # at b or before it.
        per_word = np.searchsorted(spans[:, 0], words[:, 1]) - np.searchsorted(spans[:, 1], words[:, 0], side="right")
        counts[3:] += len(words), int(per_word.sum()), int((per_word >= 2).sum())
    return Fit(*map(int, counts))


def take_bytes(texts: Iterable[str], limit: int) -> list[str]:
    """Whole documents from the front of `texts` until they hold `limit` bytes; the last is cut to fit."""
    taken: list[str] = []
    room = limit
    for text in texts:
        if room <= 0:
            break
        data = text.encode("utf-8", "replace")
        taken.append(text if len(data) <= room else data[:room].decode("utf-8", "ignore"))
        room -= len(data)
    return taken


def report(segmenters: Sequence[Segmenter], sources: dict[str, list[str]]) -> dict[str, list[Fit]]:
    """For each source, by name, the fit of each segmenter, in their order."""
    return {name: [measure(segmenter, texts) for segmenter in segmenters] for name, texts in sources.items()}
