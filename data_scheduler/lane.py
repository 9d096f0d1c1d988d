"""One lane's walk through one source: epochs, chunks, documents, tokens.

A `DocumentStream` is an endless run of tokens: per epoch the lane's chunks in dealt order, within a chunk the documents
in a seeded permutation, each followed by the end-of-document token. Where it stands is a `Position` of four integers,
and from a position alone the stream continues exactly: opening it reads one chunk, whatever came before.

Documents are encoded one by one, when they are reached: opening a 4 MB chunk costs reading and parsing it (6 ms), not
encoding it (30 ms), and a call of the encoder costs 1 µs.
"""

from typing import NamedTuple

from data_scheduler.batch import ORDINAL_BITS
from data_scheduler.encoder import Tokens
from data_scheduler.formats.records import Document
from data_scheduler.source import SourceReader
from headrace.errors import DataError

EMPTY_EPOCHS = 10_000
"""Epochs without a document for a lane before we say that there are more lanes than documents."""


class Position(NamedTuple):
    """Where a lane stands in a source; all that is needed to go on."""

    epoch: int = 0
    cursor: int = 0
    """Place in the lane's list of chunks of this epoch."""
    document: int = 0
    """Place in the chunk's permuted documents."""
    token: int = 0
    """Token within that document."""


class DocumentStream:
    """The tokens of one lane in one source, from a position on, a document at a time.

    The current document's tokens are `tokens` and, after them, the end-of-document token; `at` counts over both.
    """

    def __init__(self, reader: SourceReader, lane: int, position: Position) -> None:
        self._reader = reader
        self._lane = lane
        self._epoch, self._cursor, self._document, at = position
        self._documents: list[Document] = []
        self._ordinals: list[int] = []
        self._chunk = -1
        self.eos_id = reader.encoder.eos_id
        self._open()
        self.tokens = self._encode()
        self.at = at
        """Place in the document of the next token."""

    @property
    def position(self) -> Position:
        """Where the next token stands."""
        if self.at > len(self.tokens):  # used up; the next document is not opened before it is asked for
            return Position(self._epoch, self._cursor, self._document + 1, 0)
        return Position(self._epoch, self._cursor, self._document, self.at)

    @property
    def document_id(self) -> int:
        """The current document's id, as in a batch."""
        return self._chunk << ORDINAL_BITS | self._ordinals[self._document]

    def next_document(self) -> None:
        """Go on to the document after the current one."""
        self._document += 1
        if self._document >= len(self._documents):
            self._open()
        self.tokens = self._encode()
        self.at = 0

    def _encode(self) -> Tokens:
        document = self._documents[self._document]
        return self._reader.encoder.encode(document) if isinstance(document, str) else document

    def _open(self) -> None:
        """Make the chunk at (epoch, cursor) current, moving on while there is no document left there."""
        empty_epochs = 0
        while True:
            hand = self._reader.hand(self._epoch, self._lane)
            if self._cursor < len(hand):
                chunk = int(hand[self._cursor])
                if chunk != self._chunk:
                    self._documents, ordinals = self._reader.documents(chunk, self._epoch)
                    self._ordinals = ordinals.tolist()
                    self._chunk = chunk
                if self._document < len(self._documents):
                    return
                empty_epochs = 0 if self._documents else empty_epochs
                self._cursor += 1
            else:
                empty_epochs += 1
                if empty_epochs > EMPTY_EPOCHS:
                    raise DataError(
                        f"source {self._reader.config.name!r} has too few documents for {self._reader.lanes} lanes; "
                        "give it more data or lower data.lanes"
                    )
                self._epoch, self._cursor = self._epoch + 1, 0
            self._document, self._chunk = 0, -1
