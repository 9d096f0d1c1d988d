"""What all lanes of one source share: chunks, their dealing per epoch, reading, and the accounting of rejects."""

import itertools
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np

from data_scheduler.bands import BandFilter
from data_scheduler.batch import RejectedRecord
from data_scheduler.chunks import Chunks
from data_scheduler.config import DataConfig, SourceConfig
from data_scheduler.encoder import Encoder, Tokens
from data_scheduler.formats.records import Document, Records
from data_scheduler.kept_documents import KeptChunk, KeptDocuments
from data_scheduler.left_out import LeftOut
from data_scheduler.manifest import Manifest
from data_scheduler.objectives.config import needs_text as objectives_need_text
from data_scheduler.objectives.config import sees_ahead
from data_scheduler.order import Int64, deal, permutation
from data_scheduler.parts import PartReader
from data_scheduler.paths import file_kind
from data_scheduler.reading import TOKEN_KINDS, UnitReader, layout_units
from data_scheduler.token_cache import CachedChunk, TokenCache
from data_scheduler.transforms.config import needs_text
from data_scheduler.transforms.source_transforms import check_text, open_transforms
from data_scheduler.unit_cache import UnitCache
from headrace.errors import ConfigError, DataError

HANDS_BYTES = 1 << 19
"""Dealings that are kept, besides the last three: 90 epochs of 500 chunks dealt to 240 lanes."""
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
        self.encoder = encoder
        self.token_dtype = np.uint16 if encoder.vocab_size <= 1 << 16 else np.uint32
        self.document_start, self.document_end = boundary_tokens(data, encoder)
        self.max_epochs = config.max_epochs
        """Epochs after which lanes stop giving this source; the scheduler sets it to what the journal says."""
        self.generations = 1
        """How often the source has got files by the step being prepared; the scheduler sets it."""
        self.seed = data.seed
        self.lanes = data.lanes
        self.rejects: list[RejectedRecord] = []
        """Newly met rejects, in the order met; the scheduler empties it into each batch."""
        self._data, self._cache = data, cache
        self._hands: OrderedDict[int, tuple[Int64, Int64]] = OrderedDict()
        """(chunks lane after lane, where each lane's begin) by epoch; an array each would be five times that."""
        self._records_read = 0
        self._records_rejected = 0
        self._last_reject: RejectedRecord | None = None
        self.kept: KeptDocuments | None = None
        """Where documents are kept in memory, if they are; set from outside, which knows the other sources."""
        self._objectives = data.objectives_of(config)
        self.sees_ahead = sees_ahead(self._objectives)
        """Whether tokens of a document may see later ones of it."""
        self.transforms = open_transforms(config, [], encoder, data.seed, self._objectives)
        self._tokens: TokenCache | None = None
        # Marked text is more than its tokens, transformed text another in each epoch, and what is tokens already need
        # not be encoded.
        marked = config.prompt or config.masked_key or config.loss_weight_key or needs_text(config.transforms)
        marked = marked or objectives_need_text(self._objectives)
        self.gives_plain_tokens = not marked and self.transforms is None
        """Whether a document of text is the same tokens each time, which may be kept."""
        if data.token_cache and not marked and config.format not in TOKEN_KINDS:
            self._tokens = TokenCache(data.token_cache, encoder.fingerprint, self.token_dtype)
        self._read_as = [config.format, config.text_key, config.template, config.where, config.max_document_bytes]
        if config.band is not None:
            self._read_as += BandFilter(config.band).key
        self.original = manifest
        """The files that the source entered the run with."""
        self.grow([])
        if not self.chunks:
            raise ConfigError(f"source {config.name!r} has no data")

    def grow(self, more: Sequence[Manifest], left_out: Sequence[LeftOut] = ()) -> None:
        """Take `more` for the files that joined the source after it entered the run, in the order of their joining, and
        `left_out` for what is under quarantine when."""
        self.left_out = list(left_out)
        self.manifest, self._firsts = self.original, [0]
        tables = []
        for number, manifest in enumerate([self.original, *more]):
            self.manifest = self.manifest.with_more(manifest) if number else manifest
            tables.append(manifest.chunks(self.config, self._data.settled_chunk_bytes, self.lanes))
            self._firsts.append(self._firsts[-1] + len(tables[-1]))
        check_text(self.config, (path for path, _ in self.manifest.files), self._objectives)
        self.chunks = Chunks.joined(tables)
        units = UnitReader(self.config, self.encoder.eos_id, self.encoder.vocab_size, dict(self.manifest.files))
        self._parts = PartReader(self.config, self.manifest, self._data, units, self._cache)
        self._sizes = self.chunks.sizes()
        self._hands.clear()

    @property
    def text_bytes(self) -> int:
        """Text in one epoch, as far as it is known without reading."""
        return int(self._sizes.sum())

    def chunks_of(self, path: str) -> Iterator[int]:
        """The chunks of a file."""
        pieces = self.chunks.pieces
        numbers = [number for number, (name, _) in enumerate(pieces.files) if name == path]
        for piece in np.flatnonzero(np.isin(pieces.file, numbers)).tolist():
            yield from range(*self.chunks.firsts[piece : piece + 2].tolist())

    def read(self, chunk: int) -> Records:
        """The records of a chunk, for looking at them: rejects are not counted."""
        return self._parts.read(self.chunks[chunk])

    def generation_of(self, chunk: int) -> int:
        """0 for a chunk that was there when the source entered the run, n for one that joined with the n-th growth."""
        return bisect_right(self._firsts, chunk) - 1

    def hand(self, epoch: int, lane: int, began_with: int = 1, now: int = 1) -> Int64:
        """The lane's chunks of an epoch, in order, int64[…].

        When the lane began the epoch, the source had got files `began_with` times, `now` times by now. What was there
        is shuffled together; what joined since is at the end. Each joining is dealt after those before it, so an epoch
        deals what was there the same way whatever joins later, and lanes stay within one chunk of each other.
        """
        if epoch not in self._hands:
            joined = [
                first
                + permutation(stop - first, self.seed, "chunks", self.config.name, epoch, *([number] if number else []))
                for number, (first, stop) in enumerate(itertools.pairwise(self._firsts))
            ]
            lanes = permutation(self.lanes, self.seed, "lanes", self.config.name, epoch)
            hands = deal(self._sizes, np.concatenate(joined), lanes)
            self._hands[epoch] = np.concatenate(hands), np.cumsum([0, *map(len, hands)])
            # Lanes of a large source are an epoch apart at most; those of one with few documents drift far apart, and a
            # dealing of 500 chunks costs as much as 100 sequences.
            while len(self._hands) > max(3, HANDS_BYTES // (8 * (len(self.chunks) + self.lanes))):
                self._hands.popitem(last=False)
        dealt, firsts = self._hands[epoch]
        whole = dealt[firsts[lane] : firsts[lane + 1]]
        if len(self._firsts) == 2:
            return whole
        began = whole[whole < self._firsts[began_with]]
        if began_with > 1:
            began = began[permutation(len(began), self.seed, "hand", self.config.name, epoch, lane)]
        since = whole[(whole >= self._firsts[began_with]) & (whole < self._firsts[now])]
        return np.concatenate([began, since])

    def order(self, chunk: int, documents: int, epoch: int) -> Int64:
        """In which order an epoch takes the chunk's documents: a permutation of their numbers, int64[documents]."""
        return permutation(documents, self.seed, "documents", self.config.name, epoch, chunk)

    def documents(self, chunk: int, epoch: int) -> tuple[list[Document], Int64]:
        """(documents, ordinals) of the chunk in this epoch's order. Raises DataError past the reject limit."""
        records, ordinals = self.records(chunk)
        shuffled = ordinals[self.order(chunk, len(ordinals), epoch)]
        found = records.documents
        return [document for ordinal in shuffled.tolist() if (document := found[ordinal]) is not None], shuffled

    def open(self, chunk: int) -> KeptChunk:
        """A chunk's documents: text, or tokens where it is known what they are encoded to.

        Raises DataError past the reject limit.
        """
        found = None if self.kept is None else self.kept.get(chunk)
        if found is None:
            found = self._read(chunk)
            if self.kept is not None:
                self.kept.put(chunk, found)
        else:
            self._count_again(chunk, found.read, found.rejected)
        return found

    def _read(self, chunk: int) -> KeptChunk:
        """A chunk from the cache of tokens, or else from its file."""
        rejects = len(self.rejects)
        key = self._token_key(chunk)
        cached = None if key is None or self._tokens is None else self._tokens.load(key)
        if cached is not None:
            self._count_again(chunk, cached.read, cached.rejected)
            whole: list[Document | None] = [None] * (int(cached.places[-1]) + 1 if len(cached.places) else 0)
            for place, document in zip(cached.places.tolist(), cached.documents, strict=True):
                whole[place] = document
            return KeptChunk(whole, cached.places, cached.read, cached.rejected)
        records, places = self.records(chunk)
        found = records.documents
        rejected = [(reject.record, reject.reason) for reject in self.rejects[rejects:]]
        if key is not None and self._tokens is not None:
            for place in places.tolist():
                text = found[place]
                found[place] = self.encoder.encode(text) if isinstance(text, str) else text
            tokens = [found[place] for place in places.tolist()]
            self._tokens.store(key, CachedChunk(places, tokens, records.read, rejected))
        return KeptChunk(found, places, records.read, rejected)

    def _count_again(self, chunk: int, read: int, rejected: list[tuple[str, str]]) -> None:
        """Account for a chunk as when it was read from its file."""
        path = self.chunks[chunk].unit.path if rejected else ""
        self._count(read, [RejectedRecord(self.config.name, path, where, reason) for where, reason in rejected])

    def _token_key(self, chunk: int) -> str | None:
        """What a chunk's tokens are known by; None when they are not to be cached."""
        if self._tokens is None:
            return None
        cut = self.chunks[chunk]
        if file_kind(cut.unit.path, self.config.format)[0] in TOKEN_KINDS:
            return None
        try:
            identity = self._parts.identity(cut.unit.path)
        except OSError:
            return None  # reading it will say what is wrong
        return f"{identity} {list(cut.unit[1:])} {cut.part} {cut.parts} {cut.block} {self._read_as}"

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
        path = self.chunks[chunk].unit.path if records.rejects else ""
        rejected = []
        for reject in records.rejects:
            number, within = self.record_number(chunk, records, reject.record)
            where = f"{number}" if within is None else f"{number} of bytes {within[0]}-{within[1]}"
            rejected.append(RejectedRecord(self.config.name, path, where, reject.reason))
        self._count(records.read, rejected)

    def _count(self, read: int, rejected: list[RejectedRecord]) -> None:
        self._records_read += read
        self._records_rejected += len(rejected)
        self.rejects += rejected
        if rejected:
            self._last_reject = rejected[-1]
        if rejected and self.config.on_error == "stop":
            first = rejected[0]
            raise DataError(
                f"source {first.source!r}: {first.file}, record {first.record}: {first.reason} (on_error is `stop`)"
            )
        limit = self.config.max_reject_fraction
        last = self._last_reject  # `rejects` may have been handed over since
        if last and self._records_read >= REJECT_GRACE and self._records_rejected > limit * self._records_read:
            raise DataError(
                f"source {last.source!r}: {self._records_rejected} of {self._records_read} records rejected, past "
                f"max_reject_fraction={limit:g}; the last: {last.file}, record {last.record}: {last.reason}"
            )
