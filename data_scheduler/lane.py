"""One lane's walk through one source: epochs, chunks, documents, tokens.

A `LaneStream` is an endless run of tokens: per epoch the lane's chunks in dealt order, within a chunk the documents in
a seeded permutation, each with the boundary tokens the configuration asks for. Where it stands is a `Position`, and
from a position alone the stream continues exactly: opening it reads one chunk, whatever came before.

A chunk is read when it is opened and encoded some 64 KB at a time; sequences are then cut from an array.
"""

from typing import NamedTuple

from data_scheduler.batch import Segments
from data_scheduler.chunk_tokens import OpenChunk
from data_scheduler.order import Int64
from data_scheduler.sequences import AnyTokens
from data_scheduler.source import SourceReader
from data_scheduler.stretch import Stretch, join
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
    generations: int = 1
    """How often the source had got files when the lane began this epoch; later ones are at the end of its chunks."""


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
        self.generations: int | None = None
        """The generations of files this stream sees; None: those that the reader's are at."""
        self.dtype = reader.token_dtype
        self.rewind(position)

    def rewind(self, position: Position) -> None:
        """Go on from `position`."""
        self._epoch, self._cursor, self._document, self._at, self._generations = position
        # `_at` is the place in the stretch of the next token; before one is open, in the document where it will begin.
        self._place = 0  # the piece of the stretch that it is in,
        self._token = 0  # and its number in its document
        self._stretch: Stretch | None = None
        self._chunk: OpenChunk | None = None

    @property
    def seen_generations(self) -> int:
        """How often the source has got files by now, for this stream."""
        return self.generations or self._reader.generations

    @property
    def at_document_start(self) -> bool:
        """Whether the next token is a document's first."""
        return self.position.token == 0

    @property
    def position(self) -> Position:
        """Where the next token stands."""
        if self._stretch is None:
            return Position(self._epoch, self._cursor, self._document, self._at, self._generations)
        return Position(self._epoch, self._cursor, self._document + self._place, self._token, self._generations)

    def take(self, out: Int64 | AnyTokens) -> Segments:
        """Fill `out` (integers[n]) with the next n tokens and say which documents are where.

        Raises ExhaustedError when there are fewer left; the stream then stands where it stood and `out` is of no use.
        """
        length = len(out)
        stretch = self._stretch
        if stretch is not None and len(stretch.tokens) - self._at > length:  # the usual case
            segments, self._place, self._token = stretch.cut(self._at, self._place, out)
            self._at += length
            if self._at >= COMPACT_TOKENS:
                self._compact()
            return segments
        parts: list[tuple[int, Segments]] = []
        filled, before = 0, self.position
        while filled < length:
            try:
                stretch = self._stretch if self._stretch is not None else self._open_next(filled)
            except ExhaustedError:
                self.rewind(before)
                raise
            count = min(length - filled, len(stretch) - self._at)
            piece = out[filled : filled + count]
            segments, self._place, self._token = stretch.cut(self._at, self._place, piece)
            parts.append((filled, segments))
            filled += count
            self._at += count
            if self._at == len(stretch):
                # What comes next is not read before it is asked for; whether the chunk has more, it knows.
                self._document, self._at, self._stretch = self._document + len(stretch.begins), 0, None
        self._compact()
        return join(parts, length)

    def _compact(self) -> None:
        """Let go of tokens that were used: open chunks are most of what a scheduler holds in memory."""
        stretch = self._stretch
        if stretch is not None and self._at >= COMPACT_TOKENS and 2 * self._at >= len(stretch):
            self._stretch = stretch.tail(self._at, self._place)
            self._document += self._place
            self._at = self._place = 0

    def _open_next(self, filled: int) -> Stretch:
        """Encode what comes next in the chunk at (epoch, cursor), moving on when there is no document left there.

        Raises ExhaustedError, saying how many tokens had been `filled` in, or DataError.
        """
        reader, empty_epochs = self._reader, 0
        generations = self.seen_generations
        while True:
            if self._chunk is None:
                hand = reader.hand(self._epoch, self._lane, self._generations, generations)
                if self._cursor == len(hand):
                    # At the end of its last epoch a lane stays where it is: new files may still join that epoch.
                    if reader.max_epochs is not None and self._epoch + 1 >= reader.max_epochs:
                        raise ExhaustedError(filled)
                    empty_epochs += 1
                    if empty_epochs > EMPTY_EPOCHS:
                        raise DataError(
                            f"source {reader.config.name!r} has too few documents for {reader.lanes} lanes; "
                            "give it more data or lower data.lanes"
                        )
                    self._epoch, self._cursor, self._generations = self._epoch + 1, 0, generations
                    continue
                self._chunk = OpenChunk(reader, int(hand[self._cursor]), self._epoch, self._document, generations)
                if self._at and self._chunk.leaves_first_out:
                    self._at = 0  # it was begun before; the rest of it is left out
            stretch = self._chunk.encode_group()
            if stretch is None:
                self._chunk = None
                self._cursor, self._document, self._at = self._cursor + 1, 0, 0
            elif len(stretch) == 0:
                self._document += len(stretch.begins)
            else:
                self._stretch, self._place = stretch, stretch.place(self._at)
                self._token = self._at - int(stretch.begins[self._place])
                return stretch
