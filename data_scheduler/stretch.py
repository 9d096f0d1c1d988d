"""A run of tokens that knows where documents begin in it: what lanes hold and packers cut sequences from.

tokens   A A A e B B e C C        begins [0, 4, 7]   ids [A, B, C]   offsets [0, 0, 0]
cut(2, …)    A e B B e C          starts [0, 2, 5]   ids [A, B, C]   offsets [2, 0, 0]
"""

import numpy as np

from data_scheduler.batch import Float32, Segments
from data_scheduler.order import Int64
from data_scheduler.sequences import AnyTokens, cut


class Stretch:
    """Tokens of documents, or pieces of documents, one after the other."""

    __slots__ = ("begins", "ids", "offsets", "prefix_lengths", "tokens", "weights")

    def __init__(
        self,
        tokens: AnyTokens,
        begins: Int64,
        ids: Int64,
        offsets: Int64,
        weights: Float32 | None = None,
        prefix_lengths: Int64 | None = None,
    ) -> None:
        self.tokens = tokens
        """uint16[n] or uint32[n]"""
        self.begins = begins
        """int64[pieces]: where each piece begins, ascending, the first at 0."""
        self.ids = ids
        """int64[pieces]: the document each piece is of."""
        self.offsets = offsets
        """int64[pieces]: the token of its document at which each piece begins."""
        self.weights = weights
        """float32[n]: weight of each token in the loss; None: all 1."""
        self.prefix_lengths = prefix_lengths
        """int64[pieces]: tokens at the begin of each piece's document that see one another in both directions; None:
        every source's documents are causal."""

    def __len__(self) -> int:
        return len(self.tokens)

    def place(self, at: int) -> int:
        """The piece that token `at` is in."""
        return int(self.begins.searchsorted(at, side="right")) - 1

    def cut(self, at: int, place: int, out: Int64 | AnyTokens) -> tuple[Segments, int, int]:
        """Fill `out` with the tokens from `at`, in piece `place`, on.

        Returns which documents are where in them, the piece that the next token is in, and its number in its document.
        """
        starts, ids, offsets, after, token = cut(self.tokens, self.begins, self.ids, self.offsets, at, place, out)
        weights = None if self.weights is None else self.weights[at : at + len(out)]
        prefix_lengths = None
        if self.prefix_lengths is not None:
            own = self.prefix_lengths[self.begins.searchsorted(at + starts, side="right") - 1]
            prefix_lengths = np.where(offsets == 0, own, 0)
        return Segments(starts, ids, offsets, weights, prefix_lengths), after, token

    def tail(self, at: int, place: int) -> "Stretch":
        """The tokens from `at`, in piece `place`, on, in memory of their own."""
        begins = self.begins[place:] - at
        offsets = self.offsets[place:].copy()
        offsets[0] -= begins[0]
        begins[0] = 0
        weights = None if self.weights is None else self.weights[at:].copy()
        prefixes = None if self.prefix_lengths is None else self.prefix_lengths[place:].copy()
        return Stretch(self.tokens[at:].copy(), begins, self.ids[place:].copy(), offsets, weights, prefixes)


def join(parts: list[tuple[int, Segments]], length: int) -> Segments:
    """Segments of a row of `length` tokens from those of its parts, each given with the place where it begins."""
    if len(parts) == 1:
        return parts[0][1]
    weights = None
    if any(part.weights is not None for _, part in parts):
        weights = np.ones(length, np.float32)
        for at, part in parts:
            if part.weights is not None:
                weights[at : at + len(part.weights)] = part.weights
    # Of one source, so that either all of them have these or none.
    prefixes = [part.prefix_lengths for _, part in parts if part.prefix_lengths is not None]
    return Segments(
        np.concatenate([part.starts + np.int32(at) for at, part in parts]),
        np.concatenate([part.document_ids for _, part in parts]),
        np.concatenate([part.offsets for _, part in parts]),
        weights,
        np.concatenate(prefixes) if prefixes else None,
    )
