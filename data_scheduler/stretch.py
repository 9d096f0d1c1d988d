"""A run of tokens that knows where documents begin in it: what lanes hold and packers cut sequences from.

tokens   A A A e B B e C C        begins [0, 4, 7]   ids [A, B, C]   offsets [0, 0, 0]
cut(2, 6)    A e B B e C          starts [0, 2, 5]   ids [A, B, C]   offsets [2, 0, 0]
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_scheduler.batch import Float32, Segments
from data_scheduler.order import Int64

AnyTokens = npt.NDArray[Any]
"""uint16 for vocabularies up to 65,536, else uint32"""


class Stretch(NamedTuple):
    """Tokens of documents, or pieces of documents, one after the other."""

    tokens: AnyTokens
    """uint16[n] or uint32[n]"""
    begins: Int64
    """int64[pieces]: where each piece begins, the first at 0."""
    ids: Int64
    """int64[pieces]: the document each piece is of."""
    offsets: Int64
    """int64[pieces]: the token of its document at which each piece begins."""
    weights: Float32 | None = None
    """float32[n]: weight of each token in the loss; None: all 1."""
    has_empty: bool = False
    """Whether a document has no token at all; such a one is in no sequence."""

    def cut(self, at: int, count: int) -> tuple[AnyTokens, Segments]:
        """The tokens [at, at + count) (a view), and which documents are where in them."""
        stop = at + count
        first = int(self.begins.searchsorted(at, "right")) - 1
        last = int(self.begins.searchsorted(stop, "left"))
        starts = (self.begins[first:last] - at).astype(np.int32)
        ids, offsets = self.ids[first:last], self.offsets[first:last]
        if starts[0] < 0:
            offsets = offsets.copy()
            offsets[0] -= starts[0]
            starts[0] = 0
        if self.has_empty:
            filled = np.append(starts[1:] > starts[:-1], True)
            starts, ids, offsets = starts[filled], ids[filled], offsets[filled]
        weights = None if self.weights is None else self.weights[at:stop]
        return self.tokens[at:stop], Segments(starts, ids, offsets, weights)


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
    return Segments(
        np.concatenate([part.starts + np.int32(at) for at, part in parts]),
        np.concatenate([part.document_ids for _, part in parts]),
        np.concatenate([part.offsets for _, part in parts]),
        weights,
    )
