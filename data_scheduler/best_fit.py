"""`best_fit` packing: whole documents where they fit, full sequences, and few documents cut.

The lane's stream is taken a *window* at a time: as many tokens as WINDOW sequences hold. The window's documents are
laid out in its sequences: longest first, each where it leaves the least room (best-fit decreasing). What room is left
is filled with documents that must be cut anyway, because they are longer than a sequence or were cut by the window's
edge, and only then with pieces of others.

    width 8, window of 2     stream  A A A e  B B B B B e  C C C e  D e
    B (6) opens a sequence, then D (2) fits it exactly; A (4) and C (4) fill the other:
                             B B B B B e D e    A A A e C C C e        no document cut; `split` cuts B

A window uses exactly the tokens that `split` would have used for the same sequences, in another order, so every token
is used once, sequences are always full, and the state is where the window began and how much of it was given.

Ding et al., "Fewer Truncations Improve Language Modeling", arXiv 2404.10830, pack a whole corpus ahead of time; this is
their idea in bounded memory and with exact resume.
"""

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np

from data_scheduler.batch import Segments
from data_scheduler.lane import ExhaustedError, LaneStream, Position
from data_scheduler.order import Int64
from data_scheduler.packing import Carry
from data_scheduler.sequences import AnyTokens, BoolArray
from data_scheduler.stretch import Stretch, join

WINDOW = 16
"""Sequences laid out together. On the sample corpus at 2,048 tokens 8 / 16 / 32 leave WINDOW_CUTS of the cuts of
`split`; memory grows with it (131 KB a lane and source at 16)."""


class Piece(NamedTuple):
    """Tokens [begin, begin + length) of document number `item` of the window."""

    item: int
    begin: int
    length: int


class BestFitPacker:
    """Lays out documents a window at a time."""

    def __init__(self, stream: LaneStream, carry: Carry) -> None:
        self._stream = stream
        self._start = stream.position
        self._carry = Carry()
        self._window: Stretch | None = None
        if carry.bins:
            stream.generations = carry.generations
            self._place = self._open(carry.width, carry.bins, carry.head).place(carry.taken)
            stream.generations = None
            if carry.generations != stream.seen_generations:
                stream.rewind(stream.position)  # what follows the window may be left out
            self._carry = carry

    @property
    def position(self) -> Position:
        """Where the open window begins."""
        return self._start

    @property
    def carry(self) -> Carry:
        """How much of the open window was given, and how it was laid out."""
        return self._carry

    @property
    def reached(self) -> Position:
        """The end of the open window."""
        return self._stream.position

    def pack(self, row: Int64) -> Segments:
        """The next sequence of the window, then of the next window."""
        width, filled = len(row), 0
        parts: list[tuple[int, Segments]] = []
        while filled < width:
            window = self._window if self._window is not None else self._open(width, WINDOW, filled)
            taken = self._carry.taken
            count = min(width - filled, len(window) - taken)
            segments, self._place, _ = window.cut(taken, self._place, row[filled : filled + count])
            parts.append((filled, segments))
            filled += count
            self._carry = self._carry._replace(taken=taken + count)
            if taken + count == len(window):
                self._start, self._carry, self._window = self._stream.position, Carry(), None
        return join(parts, width)

    def begun(self) -> Int64:
        """Documents of the open window of which some tokens were given, but for one that began before the window."""
        if self._window is None:
            return np.zeros(0, np.int64)
        items = set(self._items[: int(self._window.begins.searchsorted(self._carry.taken))])
        if self._cut_at_start:
            items.discard(0)
        ids: Int64 = self._ids[sorted(items)]
        return ids

    def _open(self, width: int, bins: int, head: int) -> Stretch:
        """Take a window from the stream and lay it out; a smaller one when the source comes to its end."""
        self._start = self._stream.position
        tokens: AnyTokens = np.empty(bins * width - head, self._stream.dtype)
        try:
            segments = self._stream.take(tokens)
        except ExhaustedError as end:
            bins = (end.left + head) // width
            if bins == 0:
                raise
            tokens = tokens[: bins * width - head]
            segments = self._stream.take(tokens)
        edges = np.append(segments.starts.astype(np.int64), len(tokens))
        whole = np.ones(len(segments.starts), np.bool_)
        whole[0] = segments.offsets[0] == 0
        whole[-1] &= self._stream.at_document_start
        pieces = lay_out(np.diff(edges), whole, width, bins, head)
        self._items, self._ids = [piece.item for piece in pieces], segments.document_ids
        self._cut_at_start = not whole[0]
        self._window, self._place = _rearrange(tokens, segments, pieces), 0
        self._carry = Carry(0, width, bins, head, self._stream.seen_generations)
        return self._window


def lay_out(lengths: Int64, whole: BoolArray, width: int, bins: int, head: int) -> list[Piece]:
    """Pieces in the order in which they fill `bins` sequences of `width` tokens, the first `width - head`.

    lengths: int64[documents], tokens of each document, summing to bins · width − head; whole: bool[documents], False
    for documents that the window's edges have cut already. A pure function of its arguments.
    """
    contents: list[list[Piece]] = [[] for _ in range(bins)]
    room = [width - head] + [width] * (bins - 1)
    empty = bins - 1
    """Bins from here on up hold slices of documents longer than a sequence, and are full."""
    fillers: list[Piece] = []
    fitting: list[tuple[int, int]] = []
    for item, length in enumerate(lengths.tolist()):
        begin = 0
        while length - begin > width and empty > 0:
            contents[empty].append(Piece(item, begin, width))
            room[empty], begin, empty = 0, begin + width, empty - 1
        if begin == 0 and length <= width and whole[item]:
            fitting.append((-length, item))
        elif length > begin:
            fillers.append(Piece(item, begin, length - begin))
    gaps = sorted((room[number], number) for number in range(bins) if room[number])
    for negative, item in sorted(fitting):
        length = -negative
        piece = Piece(item, 0, length)
        if not _place(piece, gaps, contents):
            fillers.append(piece)
    # Documents that are cut already come first: another cut in them spoils no whole one.
    spoiled = [bool(whole[piece.item]) and piece.begin == 0 and piece.length <= width for piece in fillers]
    fillers = [piece for _, piece in sorted(zip(spoiled, fillers, strict=True), key=lambda it: (it[0], -it[1].length))]
    for piece in fillers:
        while piece.length and not _place(piece, gaps, contents):
            size, number = gaps.pop()
            contents[number].append(piece._replace(length=size))
            piece = Piece(piece.item, piece.begin + size, piece.length - size)
    return [piece for content in contents for piece in sorted(content)]


def _place(piece: Piece, gaps: list[tuple[int, int]], contents: list[list[Piece]]) -> bool:
    """Put a piece where it leaves the least room; False when no gap is large enough."""
    at = bisect_left(gaps, (piece.length, -1))
    if at == len(gaps):
        return False
    size, number = gaps.pop(at)
    contents[number].append(piece)
    if size > piece.length:
        insort(gaps, (size - piece.length, number))
    return True


def _rearrange(tokens: AnyTokens, segments: Segments, pieces: list[Piece]) -> Stretch:
    """The window's tokens with its pieces in their new order."""
    starts, offsets = segments.starts.tolist(), segments.offsets.tolist()
    spans = [(starts[item] + begin, starts[item] + begin + length) for item, begin, length in pieces]
    weights = segments.weights
    if weights is not None:
        weights = np.concatenate([weights[begin:end] for begin, end in spans])
    prefixes = segments.prefix_lengths
    if prefixes is not None:
        prefixes = prefixes[[piece.item for piece in pieces]]
    return Stretch(
        np.concatenate([tokens[begin:end] for begin, end in spans]),
        np.cumsum([0, *(piece.length for piece in pieces[:-1])]),
        segments.document_ids[[piece.item for piece in pieces]],
        np.array([offsets[item] + begin for item, begin, _ in pieces], np.int64),
        weights,
        prefixes,
    )
