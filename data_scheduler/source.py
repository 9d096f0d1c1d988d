"""What all lanes of one source share: chunks, their dealing per epoch, reading, and the accounting of rejects."""

from collections import OrderedDict

import numpy as np

from data_scheduler.batch import RejectedRecord
from data_scheduler.config import DataConfig, SourceConfig
from data_scheduler.encoder import Encoder, Tokens
from data_scheduler.formats.records import Document, Records
from data_scheduler.manifest import Manifest
from data_scheduler.order import Int64, deal, permutation
from data_scheduler.parts import PartReader
from data_scheduler.reading import UnitReader, layout_units
from data_scheduler.unit_cache import UnitCache
from headrace.errors import ConfigError, DataError

HANDS_CHUNKS = 1 << 18
"""Chunks in dealings that are kept, 8 bytes each, besides the last three."""
REJECT_GRACE = 1000
"""Records read before `max_reject_fraction` is enforced; a bad first record is not a bad source."""


def boundary_tokens(data: DataConfig, encoder: Encoder) -> tuple[Tokens, Tokens]:
    """(what begins a document, what ends it), uint32[0 or 1] each. Raises ConfigError when there is no such token."""
    none = np.empty(0, np.uint32)
    if data.document_start == "bos" and encoder.bos_id is None:
        raise ConfigError(
            "data.document_start is `bos`, but the tokenizer names no token that begins a document; name it as "
            "`bos_token` in tokenizer_config.json beside the tokenizer, or leave document_start at `none`"
        )
    start = none if data.document_start == "none" else np.array([encoder.bos_id], np.uint32)
    return start, none if data.document_end == "none" else np.array([encoder.eos_id], np.uint32)


class SourceReader:
    """What all lanes of one source share: its chunks, their dealing per epoch, reading, and reject accounting."""

    def __init__(
        self, config: SourceConfig, manifest: Manifest, data: DataConfig, encoder: Encoder, cache: UnitCache
    ) -> None:
        """Raises ConfigError when the source has no data."""
        self.config = config
        self.manifest = manifest
        self.chunks = manifest.chunks(config, data.settled_chunk_bytes, data.lanes)
        if not self.chunks:
            raise ConfigError(f"source {config.name!r} has no data")
        self.encoder = encoder
        self.token_dtype = np.uint16 if encoder.vocab_size <= 1 << 16 else np.uint32
        self.document_start, self.document_end = boundary_tokens(data, encoder)
        self.max_epochs = config.max_epochs
        """Epochs after which lanes stop giving this source; the scheduler sets it to what the journal says."""
        units = UnitReader(config, encoder.eos_id, encoder.vocab_size, dict(manifest.files))
        self._parts = PartReader(config, manifest, data, units, cache)
        self.seed = data.seed
        self.lanes = data.lanes
        self.rejects: list[RejectedRecord] = []
        """Newly met rejects, in the order met; the scheduler empties it into each batch."""
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
            # Lanes of a large source are an epoch apart at most; those of one with few documents drift far apart, and a
            # dealing of 500 chunks costs as much as 100 sequences.
            while len(self._hands) > max(3, HANDS_CHUNKS // len(self.chunks)):
                self._hands.popitem(last=False)
        return self._hands[epoch][lane]

    def order(self, chunk: int, documents: int, epoch: int) -> Int64:
        """In which order an epoch takes the chunk's documents: a permutation of their numbers, int64[documents]."""
        return permutation(documents, self.seed, "documents", self.config.name, epoch, chunk)

    def documents(self, chunk: int, epoch: int) -> tuple[list[Document], Int64]:
        """(documents, ordinals) of the chunk in this epoch's order. Raises DataError past the reject limit."""
        records, ordinals = self.records(chunk)
        shuffled = ordinals[self.order(chunk, len(ordinals), epoch)]
        found = records.documents
        return [document for ordinal in shuffled.tolist() if (document := found[ordinal]) is not None], shuffled

    def records(self, chunk: int) -> tuple[Records, Int64]:
        """The records of a chunk, and the places among them of the good documents."""
        records = self._parts.read(self.chunks[chunk])
        self._account(chunk, records)
        found = records.documents
        if not records.rejects and not records.filtered:
            return records, np.arange(len(found), dtype=np.int64)
        good = [place for place, document in enumerate(found) if document is not None]
        return records, np.array(good, dtype=np.int64)

    def record_number(self, chunk: int, records: Records, place: int) -> tuple[int, tuple[int, int] | None]:
        """(number of a chunk's record, byte range of the file's text it is counted in): rows and lines are counted in
        the file where that is known without reading what comes before."""
        unit, part, parts, _, block, _ = self.chunks[chunk]
        layout = self.manifest.row_groups.get(unit.path)
        if layout is not None:
            at = layout_units(unit.path, self.config.format, layout).index(unit)
            first = self.chunks[chunk].rows(layout[at][0]).start
            return sum(rows for rows, _ in layout[:at]) + first + place, None
        if block and records.blocks:
            first, number = next(found for found in reversed(records.blocks) if found[0] <= place)
            return place - first, (number * block, (number + 1) * block)
        return (place if block else part + parts * place), None if unit.stop < 0 else (unit.start, unit.stop)

    def _account(self, chunk: int, records: Records) -> None:
        path = self.chunks[chunk].unit.path
        self._records_read += len(records.documents) - records.filtered
        self._records_rejected += len(records.rejects)
        for reject in records.rejects:
            number, within = self.record_number(chunk, records, reject.record)
            where = f"{number}" if within is None else f"{number} of bytes {within[0]}-{within[1]}"
            self.rejects.append(RejectedRecord(self.config.name, path, where, reject.reason))
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
