"""From a chunk's documents to one run of tokens, in the epoch's order and with document boundaries."""

from collections.abc import Sequence

import numpy as np

from data_scheduler.batch import ORDINAL_BITS, Float32
from data_scheduler.formats.records import Document, MarkedText, MarkedTokens, Versions
from data_scheduler.left_out import empty, mask, with_gaps
from data_scheduler.order import Int64
from data_scheduler.sequences import AnyTokens, join
from data_scheduler.source import SourceReader
from data_scheduler.stretch import Stretch

GROUP_SIZE = 1 << 16
"""Characters (or tokens, of data tokenized before) encoded in one go. Together, because an encoder called between other
work finds cold caches (25 to 31 instead of 42 M tokens per CPU-second); not a whole chunk, because on a small corpus
most of the chunks are never used to their end."""


class OpenChunk:
    """A chunk's documents from some place of an epoch's order on, encoded a group at a time."""

    def __init__(self, reader: SourceReader, chunk: int, epoch: int, first: int, generation: int) -> None:
        self._reader, self._kept, self._epoch = reader, reader.kept, epoch
        self._ids = chunk << ORDINAL_BITS
        self._chunk = reader.open(chunk)
        places = self._chunk.places
        self._places = places[reader.order(chunk, len(places), epoch)[first:]]
        self._out = mask(reader, chunk, self._places, generation)
        self._left = self._places.tolist()[::-1]

    @property
    def leaves_first_out(self) -> bool:
        """Whether the first document is left out."""
        return self._out is not None and len(self._out) > 0 and bool(self._out[0])

    def encode_group(self) -> Stretch | None:
        """The next documents as tokens; None when there are none left."""
        left, documents, size = self._left, self._chunk.documents, 0
        if not left:
            return None
        begin = len(self._places) - len(left)
        group: list[Document | MarkedTokens] = []
        transforms = self._reader.transforms
        while left and size < GROUP_SIZE:
            place = left.pop()
            document = documents[place]
            assert document is not None, "places name good documents only"
            if self._out is not None and self._out[len(self._places) - len(left) - 1]:
                continue
            size += len(document.text) if isinstance(document, MarkedText | Versions) else len(document)
            if isinstance(document, str) and transforms is None:
                document = self._encoded(place, document)
            elif self._kept is None:
                documents[place] = None  # memory: the text is not needed again
            group.append(document)
        end = len(self._places) - len(left)
        ids = self._ids | self._places[begin:end]
        out = None if self._out is None or not self._out[begin:end].any() else self._out[begin:end]
        if out is not None and not group:
            return empty(out, ids, self._reader.token_dtype)
        own = ids if out is None else ids[~out]
        if transforms is not None:
            group = transforms.apply(group, own.tolist(), self._epoch)
        stretch = encode(self._reader, group, own)
        return stretch if out is None else with_gaps(stretch, out, ids)

    def _encoded(self, place: int, text: str) -> AnyTokens:
        tokens: AnyTokens = self._reader.encoder.encode(text)
        if self._kept is None:
            self._chunk.documents[place] = None
        else:
            tokens = tokens.astype(self._reader.token_dtype)
            self._kept.encoded(self._chunk, place, tokens)
        return tokens


def encode(reader: SourceReader, documents: Sequence[Document | MarkedTokens], ids: Int64) -> Stretch:
    """The documents' tokens, one after the other, each between the boundary tokens of `reader`."""
    encoder, before, after = reader.encoder, reader.document_start, reader.document_end
    rows: list[AnyTokens] = []
    marked: list[tuple[int, MarkedText | MarkedTokens, list[int]]] = []
    for number, document in enumerate(documents):
        if isinstance(document, np.ndarray):
            rows.append(document)
        elif isinstance(document, str):
            rows.append(encoder.encode(document))
        else:
            assert not isinstance(document, Versions), "transforms draw one of them"
            pieces = [encoder.encode(piece) if isinstance(piece, str) else piece for piece, _ in document.pieces]
            marked.append((number, document, [len(piece) for piece in pieces]))
            rows.append(np.concatenate([before[:0], *pieces]))
    tokens, begins = join(rows, before, after, reader.token_dtype)
    weights = _weights(reader.config.loss_weight, marked, begins + len(before), len(tokens))
    prefixes = None
    if reader.sees_ahead:
        prefixes = np.zeros(len(rows), np.int64)
        for number, document, _ in marked:
            if isinstance(document, MarkedTokens) and document.prefix_length:
                prefixes[number] = len(before) + document.prefix_length
    return Stretch(tokens, begins, ids, np.zeros(len(rows), np.int64), weights, prefixes)


def _weights(
    base: float, marked: list[tuple[int, MarkedText | MarkedTokens, list[int]]], begins: Int64, total: int
) -> Float32 | None:
    """float32[total], or None when every token weighs 1. The end-of-document token weighs what its document does."""
    if base == 1.0 and not marked:
        return None
    weights = np.full(total, base, np.float32)
    for number, document, lengths in marked:
        at = int(begins[number])
        end = at + sum(lengths) + 1  # one past a document without an end token: its neighbour's first, never predicted
        weights[at:end] *= np.float32(document.weight)
        for (_, learned), length in zip(document.pieces, lengths, strict=True):
            if not learned:
                weights[at : at + length] = 0.0
            at += length
    return weights
