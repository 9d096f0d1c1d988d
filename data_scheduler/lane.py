"""One lane's walk through one source: epochs, chunks, documents, tokens.

A `DocumentStream` is an endless run of tokens: per epoch the lane's chunks in dealt order, within a chunk the documents
in a seeded permutation, each followed by the end-of-document token. Where it stands is a `Position` of four integers,
and from a position alone the stream continues exactly: opening it reads one chunk, whatever came before.

Documents are encoded one by one, when they are reached: opening a 4 MB chunk costs reading and parsing it (6 ms), not
encoding it (30 ms), and a call of the encoder costs 1 µs.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from data_scheduler.batch import ORDINAL_BITS, RejectedRecord
from data_scheduler.config import DataConfig, SourceConfig
from data_scheduler.encoder import Encoder, Tokens
from data_scheduler.formats.records import Document, Records, Unit
from data_scheduler.manifest import Manifest
from data_scheduler.order import Int64, deal, permutation
from data_scheduler.reading import UnitReader, layout_units
from headrace.errors import ConfigError, DataError

REJECT_GRACE = 1000
"""Records read before `max_reject_fraction` is enforced; a bad first record is not a bad source."""
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


class UnitCache:
    """The last units read, up to `budget` bytes of text: parts of one unit are read by many lanes."""

    def __init__(self, budget: int = 256 << 20) -> None:
        self._budget = budget
        self._held = 0
        self._records: OrderedDict[tuple[str, Unit], Records] = OrderedDict()

    def get(self, source: str, unit: Unit, read: Callable[[], Records]) -> tuple[Records, bool]:
        """The unit's records, and whether they had to be read."""
        key = (source, unit)
        if key in self._records:
            self._records.move_to_end(key)
            return self._records[key], False
        records = read()
        self._records[key] = records
        self._held += records.size
        while self._held > self._budget and len(self._records) > 1:
            _, dropped = self._records.popitem(last=False)
            self._held -= dropped.size
        return records, True


class SourceReader:
    """What all lanes of one source share: its chunks, their dealing per epoch, reading, and reject accounting."""

    def __init__(
        self, config: SourceConfig, manifest: Manifest, data: DataConfig, encoder: Encoder, cache: UnitCache
    ) -> None:
        """Raises ConfigError when the source has no data."""
        self.config = config
        self.manifest = manifest
        self.chunks = manifest.chunks(config, data.chunk_bytes, data.lanes)
        if not self.chunks:
            raise ConfigError(f"source {config.name!r} has no data")
        self.encoder = encoder
        self._units = UnitReader(config, encoder.eos_id, encoder.vocab_size)
        self.seed = data.seed
        self.lanes = data.lanes
        self.rejects: list[RejectedRecord] = []
        """Newly met rejects, in the order met; the scheduler empties it into each batch."""
        self._cache = cache
        self._sizes = np.array([chunk.size for chunk in self.chunks], dtype=np.int64)
        self._hands: OrderedDict[int, list[Int64]] = OrderedDict()
        self._records_read = 0
        self._records_rejected = 0

    def hand(self, epoch: int, lane: int) -> Int64:
        """The lane's chunks of an epoch, in order, int64[…]."""
        if epoch not in self._hands:
            order = permutation(len(self.chunks), self.seed, "chunks", self.config.name, epoch)
            lanes = permutation(self.lanes, self.seed, "lanes", self.config.name, epoch)
            self._hands[epoch] = deal(self._sizes, order, lanes)
            while len(self._hands) > 3:  # lanes are at most an epoch apart in a healthy source
                self._hands.popitem(last=False)
        return self._hands[epoch][lane]

    def documents(self, chunk: int, epoch: int) -> tuple[list[Document], Int64]:
        """(documents, ordinals) of the chunk in this epoch's order. Raises DataError past the reject limit."""
        records, ordinals = self.records(chunk)
        order = permutation(len(ordinals), self.seed, "documents", self.config.name, epoch, chunk)
        shuffled = ordinals[order]
        found = records.documents
        return [document for ordinal in shuffled.tolist() if (document := found[ordinal]) is not None], shuffled

    def records(self, chunk: int) -> tuple[Records, Int64]:
        """The records of a chunk's unit, and the places in it of the chunk's own good documents."""
        unit, part, parts, _ = self.chunks[chunk]

        def read() -> Records:
            return self._units.read(unit)

        if parts > 1:
            records, fresh = self._cache.get(self.config.name, unit, read)
        else:
            records, fresh = read(), True
        if fresh:
            self._account(unit, records)
        found = records.documents
        if not records.rejects and not records.filtered:
            return records, np.arange(part, len(found), parts, dtype=np.int64)
        own = [place for place in range(part, len(found), parts) if found[place] is not None]
        return records, np.array(own, dtype=np.int64)

    def record_number(self, unit: Unit, place: int) -> tuple[int, tuple[int, int] | None]:
        """(number of a record, byte range it is counted in): rows and lines are counted in the file where that is known
        without reading what comes before."""
        layout = self.manifest.row_groups.get(unit.path)
        if layout is not None:
            units = layout_units(unit.path, self.config.format, layout)
            return sum(rows for rows, _ in layout[: units.index(unit)]) + place, None
        return place, None if unit.stop < 0 else (unit.start, unit.stop)

    def _account(self, unit: Unit, records: Records) -> None:
        self._records_read += len(records.documents) - records.filtered
        self._records_rejected += len(records.rejects)
        for reject in records.rejects:
            number, within = self.record_number(unit, reject.record)
            where = f"{number}" if within is None else f"{number} of bytes {within[0]}-{within[1]}"
            self.rejects.append(RejectedRecord(self.config.name, unit.path, where, reject.reason))
        if records.rejects and self.config.on_error == "stop":
            first = self.rejects[-len(records.rejects)]
            raise DataError(
                f"source {first.source!r}: {first.file}, record {first.record}: {first.reason} (on_error is `stop`)"
            )
        limit = self.config.max_reject_fraction
        if self._records_read >= REJECT_GRACE and self._records_rejected > limit * self._records_read:
            last = self.rejects[-1]
            raise DataError(
                f"source {last.source!r}: {self._records_rejected} of {self._records_read} records rejected, past "
                f"max_reject_fraction={limit:g}; the last: {last.file}, record {last.record}: {last.reason}"
            )


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
