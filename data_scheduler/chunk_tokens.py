"""From a chunk's documents to one run of tokens, in the epoch's order and with document boundaries."""

from collections.abc import Sequence
from itertools import chain

import numpy as np

from data_scheduler.batch import ORDINAL_BITS, Float32
from data_scheduler.encoder import Tokens
from data_scheduler.formats.records import Document, MarkedText
from data_scheduler.left_out import empty, mask, with_gaps
from data_scheduler.order import Int64
from data_scheduler.sequences import AnyTokens
from data_scheduler.source import SourceReader
from data_scheduler.stretch import Stretch

GROUP_SIZE = 1 << 16
"""Characters (or tokens, of data tokenized before) encoded in one go. Together, because an encoder called between other
work finds cold caches (25 to 31 instead of 42 M tokens per CPU-second); not a whole chunk, because on a small corpus
most of the chunks are never used to their end."""


class OpenChunk:
    """A chunk's documents from some place of an epoch's order on, encoded a group at a time."""

    def __init__(self, reader: SourceReader, chunk: int, epoch: int, first: int, generation: int) -> None:
        self._reader = reader
        self._ids = chunk << ORDINAL_BITS
        found, ordinals = reader.open(chunk)
        self._places = ordinals[reader.order(chunk, len(ordinals), epoch)[first:]]
        self._documents = [found[place] for place in self._places.tolist()]
        self._out = mask(reader, chunk, self._places, generation)
        self._next = 0

    @property
    def leaves_first_out(self) -> bool:
        """Whether the first document is left out."""
        return self._out is not None and len(self._out) > 0 and bool(self._out[0])

    def encode_group(self) -> Stretch | None:
        """The next documents as tokens; None when there are none left."""
        begin, size = self._next, 0
        if begin == len(self._documents):
            return None
        while self._next < len(self._documents) and size < GROUP_SIZE:
            document = self._documents[self._next]
            assert document is not None, "ordinals name good documents only"
            size += len(document.text) if isinstance(document, MarkedText) else len(document)
            self._next += 1
        group = self._documents[begin : self._next]
        self._documents[begin : self._next] = [None] * len(group)  # memory: the text is not needed again
        ids = self._ids | self._places[begin : self._next]
        if self._out is None or not self._out[begin : self._next].any():
            return encode(self._reader, group, ids)
        out = self._out[begin : self._next]
        kept = [document for document, gone in zip(group, out.tolist(), strict=True) if not gone]
        if not kept:
            return empty(out, ids, self._reader.token_dtype)
        return with_gaps(encode(self._reader, kept, ids[~out]), out, ids)


def encode(reader: SourceReader, documents: Sequence[Document | None], ids: Int64) -> Stretch:
    """The documents' tokens, one after the other, each between the boundary tokens of `reader`."""
    encoder, before, after = reader.encoder, reader.document_start, reader.document_end
    rows: list[Tokens] = []
    marked: list[tuple[int, MarkedText, list[int]]] = []
    for number, document in enumerate(documents):
        if isinstance(document, str):
            rows.append(encoder.encode(document))
        elif isinstance(document, MarkedText):
            pieces = [encoder.encode(text) for text, _ in document.pieces]
            marked.append((number, document, [len(piece) for piece in pieces]))
            rows.append(np.concatenate([before[:0], *pieces]))
        else:
            assert document is not None, "ordinals name good documents only"
            rows.append(document)
    lengths = np.fromiter(map(len, rows), np.int64, len(rows)) + (len(before) + len(after))
    begins = np.cumsum(lengths) - lengths
    parts = (
        chain.from_iterable((before, row, after) for row in rows)
        if len(before)
        else chain.from_iterable((row, after) for row in rows)
    )
    tokens: AnyTokens = np.concatenate(list(parts), dtype=reader.token_dtype, casting="unsafe")
    weights = _weights(reader.config.loss_weight, marked, begins + len(before), len(tokens))
    return Stretch(tokens, begins, ids, np.zeros(len(rows), np.int64), weights)


def _weights(base: float, marked: list[tuple[int, MarkedText, list[int]]], begins: Int64, total: int) -> Float32 | None:
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
