"""Packers: from a lane's documents to full sequences of `seq_len + 1` tokens, without padding.

`split` concatenates documents and cuts: every token is used exactly once, and the rest of a document cut at the end
opens the lane's next sequence of that source.

    seq_len + 1 = 8      documents  A A A A A e   B B e   C C C C C C C e      (e: end of document)
    first sequence       A A A A A e B B     starts [0, 6]
    second sequence      e C C C C C C C     starts [0, 1], offsets [2, 0]: it begins at token 2 of B

`best_fit` (`best_fit.py`) takes the same tokens a window at a time and lays its documents out whole wherever they fit.
"""

from typing import NamedTuple, Protocol

import numpy as np

from data_scheduler.batch import Segments
from data_scheduler.lane import LaneStream, Position
from data_scheduler.order import Int64


class Carry(NamedTuple):
    """What a packer must remember besides its stream's position."""

    taken: int = 0
    """Tokens already given of the window that begins at the position."""
    width: int = 0
    """Tokens per sequence the window was laid out for."""
    bins: int = 0
    """Sequences the window was laid out for; 0: no window is open."""
    head: int = 0
    """Tokens of the window's first sequence that came from the window before."""
    generations: int = 0
    """How often the source had got files when the window was opened."""


class Packer(Protocol):
    """Cuts sequences from one lane's stream of one source; made again from (position, carry) it continues exactly."""

    @property
    def position(self) -> Position:
        """Where the stream must be opened to go on."""
        ...

    @property
    def carry(self) -> Carry:
        """What else is needed to go on."""
        ...

    def pack(self, row: Int64) -> Segments:
        """Fill `row` (int64[seq_len + 1]) with the next sequence's tokens and say which documents are where.

        Raises ExhaustedError when the source has no full sequence left for this lane.
        """
        ...

    @property
    def reached(self) -> Position:
        """Where the stream stands: past all that was given, and past what lies ready to be given."""
        ...

    def begun(self) -> Int64:
        """int64[documents]: ids of documents that begin after `position` and of which some tokens were given."""
        ...


class SplitPacker:
    """Concatenate and cut."""

    carry = Carry()

    def __init__(self, stream: LaneStream, carry: Carry = carry) -> None:
        self._stream = stream

    @property
    def position(self) -> Position:
        """Where the next token stands."""
        return self._stream.position

    @property
    def reached(self) -> Position:
        """The same: nothing lies ready."""
        return self._stream.position

    def pack(self, row: Int64) -> Segments:
        """The next tokens of the stream, as many as `row` holds."""
        return self._stream.take(row)

    def begun(self) -> Int64:
        """None: the position is past all that was given."""
        return np.zeros(0, np.int64)
