"""Packers: from a lane's documents to full sequences of `seq_len + 1` tokens, without padding.

`split` concatenates documents and cuts: every token is used exactly once, and the rest of a document cut at the end
opens the lane's next sequence of that source.

    seq_len + 1 = 8      documents  A A A A A e   B B e   C C C C C C C e      (e: end of document)
    first sequence       A A A A A e B B     starts [0, 6]
    second sequence      e C C C C C C C     starts [0, 1], offset 2: it begins at token 2 of B
"""

from typing import Protocol

import numpy as np

from data_scheduler.batch import Segments
from data_scheduler.lane import DocumentStream
from data_scheduler.order import Int64


class Packer(Protocol):
    """Cuts the next sequence from a stream. The stream's `Position` is the only state a packer may rely on."""

    def pack(self, stream: DocumentStream, row: Int64) -> Segments:
        """Fill `row` (int64[seq_len + 1]) with the next sequence's tokens and say which documents are where."""
        ...


class SplitPacker:
    """Concatenate and cut."""

    def pack(self, stream: DocumentStream, row: Int64) -> Segments:
        """The next tokens of the stream, as many as `row` holds."""
        starts, ids = [], []
        length, filled, offset = len(row), 0, -1
        while filled < length:
            if stream.at > len(stream.tokens):
                stream.next_document()
            tokens, at = stream.tokens, stream.at
            if offset < 0:
                offset = at
            starts.append(filled)
            ids.append(stream.document_id)
            taken = min(length - filled, len(tokens) - at)
            row[filled : filled + taken] = tokens[at : at + taken]
            filled += taken
            at += taken
            if filled < length:  # so the document is used up but for its end
                row[filled] = stream.eos_id
                filled += 1
                at += 1
            stream.at = at
        return Segments(np.array(starts, dtype=np.int32), np.array(ids, dtype=np.int64), offset)


PACKERS: dict[str, type[Packer]] = {"split": SplitPacker}
