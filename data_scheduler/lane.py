"""One lane's walk through one source: epochs, chunks, documents, tokens.

A `LaneStream` is an endless run of tokens: per epoch the lane's chunks in dealt order, within a chunk the documents in
a seeded permutation, each with the boundary tokens the configuration asks for. Where it stands is a `Position`, and
from a position alone the stream continues exactly: opening it reads one chunk, whatever came before.

A chunk is encoded when it is opened, from the document where the lane stands to the chunk's end: sequences are then cut
from an array at memory speed (2 µs each), where going document by document costs a microsecond and a half a document.
"""

from typing import NamedTuple

from data_scheduler.batch import Segments
from data_scheduler.chunk_tokens import open_chunk
from data_scheduler.order import Int64
from data_scheduler.source import SourceReader
from data_scheduler.stretch import AnyTokens, Stretch, join
from headrace.errors import DataError

EMPTY_EPOCHS = 10_000
"""Epochs without a document for a lane before we say that there are more lanes than documents."""
COMPACT_TOKENS = 1 << 14
"""A used part of an open chunk is let go once it is this long and half of what is held."""


class Position(NamedTuple):
    """Where a lane stands in a source; all that is needed to go on."""

    epoch: int = 0
    cursor: int = 0
    """Place in the lane's list of chunks of this epoch."""
    document: int = 0
    """Place in the chunk's permuted documents."""
    token: int = 0
    """Token within that document, boundary tokens included."""


class ExhaustedError(Exception):
    """The lane went through its documents of this source `max_epochs` times."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self.left = left
        """Tokens there were, fewer than asked for."""


class LaneStream:
    """The tokens of one lane in one source, from a position on."""

    def __init__(self, reader: SourceReader, lane: int, position: Position) -> None:
        self._reader = reader
        self._lane = lane
        self.dtype = reader.token_dtype
        self.rewind(position)

    def rewind(self, position: Position) -> None:
        """Go on from `position`."""
        self._epoch, self._cursor, self._document, self._at = position
        # `_at` is the place in the stretch of the next token; before one is open, in the document where it will begin.
        self._stretch: Stretch | None = None

    @property
    def at_document_start(self) -> bool:
        """Whether the next token is a document's first."""
        return self.position.token == 0

    @property
    def position(self) -> Position:
        """Where the next token stands."""
        if self._stretch is None:
            return Position(self._epoch, self._cursor, self._document, self._at)
        place = int(self._stretch.begins.searchsorted(self._at, "right")) - 1
        token = self._at - int(self._stretch.begins[place]) + int(self._stretch.offsets[place])
        return Position(self._epoch, self._cursor, self._document + place, token)

    def take(self, out: Int64 | AnyTokens) -> Segments:
        """Fill `out` (integers[n]) with the next n tokens and say which documents are where.

        Raises ExhaustedError when there are fewer left; the stream then stands at its end and `out` is of no use.
        """
        parts: list[tuple[int, Segments]] = []
        filled, length = 0, len(out)
        while filled < length:
            stretch = self._stretch or self._next(filled)
            count = min(length - filled, len(stretch.tokens) - self._at)
            tokens, segments = stretch.cut(self._at, count)
            out[filled : filled + count] = tokens
            parts.append((filled, segments))
            filled += count
            self._at += count
            if self._at == len(stretch.tokens):  # the next chunk is not opened before it is asked for
                self._cursor, self._document, self._at, self._stretch = self._cursor + 1, 0, 0, None
        self._compact()
        return join(parts, length)

    def _compact(self) -> None:
        """Let go of tokens that were used: open chunks are most of what a scheduler holds in memory."""
        stretch = self._stretch
        if stretch is None or self._at < COMPACT_TOKENS or 2 * self._at < len(stretch.tokens):
            return
        begins, at = stretch.begins, self._at
        place = int(begins.searchsorted(at, "right")) - 1
        offsets = stretch.offsets[place:].copy()
        offsets[0] += at - begins[place]
        moved = begins[place:] - at
        moved[0] = 0
        weights = None if stretch.weights is None else stretch.weights[at:].copy()
        tokens, ids = stretch.tokens[at:].copy(), stretch.ids[place:].copy()
        self._stretch = Stretch(tokens, moved, ids, offsets, weights, stretch.has_empty)
        self._document += place
        self._at = 0

    def _next(self, filled: int) -> Stretch:
        """Open the chunk at (epoch, cursor), moving on while there is no document left there.

        Raises ExhaustedError, saying how many tokens had been `filled` in, or DataError.
        """
        reader, empty_epochs = self._reader, 0
        while True:
            if reader.max_epochs is not None and self._epoch >= reader.max_epochs:
                raise ExhaustedError(filled)
            hand = reader.hand(self._epoch, self._lane)
            if self._cursor < len(hand):
                stretch = open_chunk(reader, int(hand[self._cursor]), self._epoch, self._document)
                if stretch is not None and len(stretch.tokens):
                    self._stretch = stretch
                    return stretch
                self._cursor += 1
            else:
                empty_epochs += 1
                if empty_epochs > EMPTY_EPOCHS:
                    raise DataError(
                        f"source {reader.config.name!r} has too few documents for {reader.lanes} lanes; "
                        "give it more data or lower data.lanes"
                    )
                self._epoch, self._cursor = self._epoch + 1, 0
            self._document, self._at = 0, 0
