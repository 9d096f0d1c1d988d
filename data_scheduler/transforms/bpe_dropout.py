"""BPE-dropout: the tokenizer's own merges, each left out with a probability whenever it could be the next.

Provilkov, Emelianenko and Voita, "BPE-Dropout: Simple and Effective Subword Regularization", arXiv 1910.13267,
algorithm 1. Per word, starting from its smallest symbols:

    repeat: drop every possible merge with probability p; of those left make the one of the highest rank, leftmost first
    until none is left

`tokenizers` has this as the option `dropout`, but draws from the thread's own generator, which nothing can seed. So the
words, and their tokens without dropout, come from `tokenizers` itself, and only what dropout changes is made here:

- Without a drop a word of s symbols and t tokens makes s - t merges, and each of them was the first in rank. So s - t
  random numbers, none below p, mean that the word keeps its tokens. Those are looked at together for a whole document.
- Only a word with a drop is merged again, from its symbols, with the same outcomes up to the first drop.

At p = 0 nothing but `tokenizers` decides, so tokens are equal by construction. A word whose tokens its merges do not
make (`ignore_merges` takes whole words from the vocabulary) keeps them.
"""

import json
from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from itertools import pairwise

import numpy as np

from data_scheduler.encoder import Encoder, GigatokenEncoder, HuggingFaceEncoder, Text, Tokens, as_text
from data_scheduler.order import Int64, draws
from data_scheduler.transforms.chance import are_drawn
from headrace.errors import ConfigError

KEPT_WORDS = 1 << 18
"""Words of several tokens whose symbols are remembered: 40 MB."""
BLOCK = 64
"""Further random numbers that are made in one go."""


class DropoutEncoder:
    """Encodes with dropout, for one tokenizer."""

    def __init__(self, encoder: Encoder) -> None:
        """Raises ConfigError for a tokenizer that is not BPE."""
        reference = encoder.reference if isinstance(encoder, GigatokenEncoder) else encoder
        kind = reference.name
        model = {}
        if isinstance(reference, HuggingFaceEncoder):
            model = json.loads(reference.tokenizer.to_str())["model"]
            kind = model["type"]
        if kind != "BPE" or model.get("continuing_subword_prefix"):
            hint = "convert it to a tokenizer.json, or " if kind == "sentencepiece" else ""
            what = "a SentencePiece model" if kind == "sentencepiece" else f"of kind {kind}"
            raise ConfigError(
                f"transforms: bpe_dropout needs a BPE tokenizer.json, this tokenizer is {what}; "
                f"{hint}leave bpe_dropout out"
            )
        assert isinstance(reference, HuggingFaceEncoder)
        self._tokenizer = reference.tokenizer
        vocab = model["vocab"]
        self._merges: dict[tuple[int, int], tuple[int, int]] = {}
        """(left, right) → (rank, what they become)."""
        made_of: dict[int, tuple[int, int]] = {}
        for rank, merge in enumerate(model["merges"]):
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            pair = vocab[left], vocab[right]
            became = vocab[left + right]
            self._merges[pair] = rank, became
            made_of.setdefault(became, pair)
        self._made_of = made_of
        self._words: dict[tuple[int, ...], tuple[int, ...]] = {}
        # Most words are one token; how many merges that takes is looked up for all of them at once.
        self._merges_of = np.full(encoder.vocab_size, -1, np.int64)

    def encode(self, text: Text, p: float, *key: int | str) -> Tokens:
        """The text's tokens with merges dropped with probability `p`, uint32[n]; equal keys give equal tokens."""
        encoding = self._tokenizer.encode(as_text(text), add_special_tokens=False)
        ids = np.array(encoding.ids, np.uint32)
        if not len(ids) or not p:
            return ids
        words = np.array(encoding.word_ids, np.int64)
        begins = np.flatnonzero(np.append(True, words[1:] != words[:-1]))
        merges = self._count_merges(ids, begins)
        numbers = draws(int(merges.sum()), *key)
        dropped = np.flatnonzero(are_drawn(numbers, p))
        if not len(dropped):
            return ids
        ends = merges.cumsum()
        changed, firsts = np.unique(ends.searchsorted(dropped, side="right"), return_index=True)
        survived = dropped[firsts] - (ends - merges)[changed]
        edges = np.append(begins, len(ids))
        more = _dropped(p, *key)
        parts, at = [], 0
        for word, count in zip(changed.tolist(), survived.tolist(), strict=True):
            begin, end = int(edges[word]), int(edges[word + 1])
            parts += [ids[at:begin], self._merged(self._symbols(tuple(ids[begin:end].tolist())), count, more)]
            at = end
        return np.concatenate([*parts, ids[at:]])

    def _count_merges(self, ids: Tokens, begins: Int64) -> Int64:
        """Merges that make each word, int64[words]."""
        lengths = np.diff(np.append(begins, len(ids)))
        merges = np.where(lengths == 1, self._merges_of[ids[begins]], -1)
        for word in np.flatnonzero(merges < 0).tolist():
            begin = int(begins[word])
            tokens = tuple(ids[begin : begin + int(lengths[word])].tolist())
            merges[word] = len(self._symbols(tokens)) - len(tokens)
            if len(tokens) == 1:
                self._merges_of[tokens[0]] = merges[word]
        return merges

    def _symbols(self, word: tuple[int, ...]) -> tuple[int, ...]:
        """The smallest symbols of a word's tokens; the tokens themselves where merging does not lead back to them."""
        known = self._words.get(word)
        if known is None:
            symbols: list[int] = []
            left = list(reversed(word))
            while left:
                token = left.pop()
                if token in self._made_of:
                    left += reversed(self._made_of[token])
                else:
                    symbols.append(token)
            made = self._merged(tuple(symbols), len(symbols), iter(()))
            known = tuple(symbols) if made.tolist() == list(word) else word
            if len(self._words) >= KEPT_WORDS:
                self._words.clear()
            self._words[word] = known
        return known

    def _merged(self, symbols: tuple[int, ...], survive: int, more: Iterator[bool]) -> Tokens:
        """The symbols merged: the first `survive` merges are made, the next is dropped, then `more` says."""
        ids, merges = list(symbols), self._merges
        after = [*range(1, len(ids)), -1]
        before = list(range(-1, len(ids) - 1))
        queue = []
        for at, pair in enumerate(pairwise(ids)):
            found = merges.get(pair)
            if found is not None:
                queue.append((found[0], at, pair))
        heapify(queue)
        put_off = []
        made = 0
        while queue:
            entry = heappop(queue)
            _, at, pair = entry
            right = after[at]
            if ids[at] != pair[0] or right < 0 or ids[right] != pair[1]:
                continue  # one of the two was merged with another since
            dropped = made == survive if made <= survive else next(more)
            made += made <= survive
            if dropped:
                put_off.append(entry)
                continue
            ids[at], ids[right] = merges[pair][1], -1
            beyond = after[at] = after[right]
            if beyond >= 0:
                before[beyond] = at
                self._offer(queue, ids, at, beyond)
            if before[at] >= 0:
                self._offer(queue, ids, before[at], at)
            for entry in put_off:
                heappush(queue, entry)
            put_off.clear()
        return np.array([token for token in ids if token >= 0], np.uint32)

    def _offer(self, queue: list[tuple[int, int, tuple[int, int]]], ids: list[int], left: int, right: int) -> None:
        pair = ids[left], ids[right]
        found = self._merges.get(pair)
        if found is not None:
            heappush(queue, (found[0], left, pair))


def _dropped(p: float, *key: int | str) -> Iterator[bool]:
    """Whether each further merge is dropped, without end."""
    block = 0
    while True:
        yield from are_drawn(draws(BLOCK << min(block, 8), *key, "more", block), p).tolist()
        block += 1
