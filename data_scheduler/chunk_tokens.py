"""From a chunk's documents to one run of tokens, in the epoch's order and with document boundaries."""

from collections.abc import Sequence
from itertools import chain

import numpy as np

from data_scheduler.batch import ORDINAL_BITS, Float32
from data_scheduler.encoder import Tokens
from data_scheduler.formats.records import Document, MarkedText
from data_scheduler.order import Int64
from data_scheduler.source import SourceReader
from data_scheduler.stretch import AnyTokens, Stretch


def open_chunk(reader: SourceReader, chunk: int, epoch: int, first: int = 0) -> Stretch | None:
    """The chunk's documents from place `first` of the epoch's order on; None when there are none."""
    records, ordinals = reader.records(chunk)
    places = ordinals[reader.order(chunk, len(ordinals), epoch)[first:]]
    if not len(places):
        return None
    found = records.documents
    documents = [found[place] for place in places.tolist()]
    return encode(reader, documents, chunk << ORDINAL_BITS | places)


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
    begins = np.zeros(len(rows), np.int64)
    np.cumsum(lengths[:-1], out=begins[1:])
    if len(after) and not len(before):
        parts = chain.from_iterable((row, after) for row in rows)
    else:
        parts = chain.from_iterable((before, row, after) for row in rows)
    tokens: AnyTokens = np.concatenate(list(parts), dtype=reader.token_dtype, casting="unsafe")
    weights = _weights(reader.config.loss_weight, marked, begins + len(before), len(tokens))
    return Stretch(tokens, begins, ids, np.zeros(len(rows), np.int64), weights, not lengths.all())


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
