"""What the scheduler hands to the trainer: packed sequences, and the batch they form on one data-parallel rank."""

import hashlib
import struct
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_scheduler.order import Int64
from data_scheduler.sequences import BoolArray, Int32, layout

Float32 = npt.NDArray[np.float32]

ORDINAL_BITS = 24
"""A document id is chunk number << 24 | place in its unit: unique in a source, resolved by `headrace data trace`."""


class Segments(NamedTuple):
    """Which documents are where in a packed sequence."""

    starts: Int32
    """int32[segments]: where each document begins in the sequence; the first is 0."""
    document_ids: Int64
    """int64[segments]"""
    offsets: Int64
    """int64[segments]: token of its document at which each segment begins."""
    weights: Float32 | None = None
    """float32[seq_len + 1]: weight of each token in the loss; None: all 1."""
    prefix_lengths: Int64 | None = None
    """int64[segments]: tokens at the begin of each segment that see one another in both directions; None where the
    source's documents are all causal."""

    def with_whole_prefixes(self, width: int) -> "Segments":
        """A sequence of `width` tokens where prefixes that are cut by its end, or end with it, are causal: nothing that
        they were read for follows them."""
        if self.prefix_lengths is None:
            return self
        lengths = np.diff(np.append(self.starts, width))
        return self._replace(prefix_lengths=np.where(self.prefix_lengths < lengths, self.prefix_lengths, 0))


def sequence_digest(
    source_id: int,
    starts: Int32,
    tokens: bytes | memoryview,
    weights: Float32 | None = None,
    prefix_lengths: Int64 | None = None,
) -> bytes:
    """SHA-256 of a sequence, 32 bytes: source id, number of documents, their boundaries and token ids as little-endian
    32-bit integers, then, where tokens have loss weights, these as 32-bit floats, then, where documents may have
    prefixes, `prefix` and their lengths. `tokens` are such integers."""
    digest = hashlib.sha256(_TWO_NUMBERS.pack(source_id, len(starts)) + starts.astype("<i4", copy=False).tobytes())
    digest.update(tokens)
    if weights is not None:
        digest.update(np.ascontiguousarray(weights, "<f4").data)
    if prefix_lengths is not None:
        digest.update(b"prefix" + prefix_lengths.astype("<i4").tobytes())
    return digest.digest()


_TWO_NUMBERS = struct.Struct("<II")


def batch_sha256(digests: list[bytes]) -> str:
    """The hash of a step's global batch from its sequences' digests in global order."""
    return hashlib.sha256(b"".join(digests)).hexdigest()


class RejectedRecord(NamedTuple):
    """A record that was skipped, as written to `rejects.jsonl`."""

    source: str
    file: str
    record: str
    """Where in the file: record number of the file, or of the byte range or row group named here."""
    reason: str


@dataclass
class Batch:
    """The sequences of one step on one data-parallel rank, in global order.

    Counted over all steps, sequence g is rank g mod dp_size's.
    """

    step: int
    tokens: Int64
    """int64[b, seq_len + 1]; the model sees [:, :-1] and predicts [:, 1:]."""
    starts: list[Int32]
    """Per sequence, where documents begin within its seq_len + 1 tokens."""
    source_ids: Int64
    """int64[b]: place of the source in the configuration."""
    segment_ids: list[Int64]
    """Per sequence, the document id of each segment."""
    offsets: list[Int64]
    """Per sequence, the token of its document at which each segment begins."""
    slots: Int64
    """int64[b]: place of each sequence in the global batch."""
    weights: list[Float32 | None]
    """Per sequence, the weight of each of its seq_len + 1 tokens in the loss; None where all are 1."""
    prefix_lengths: list[Int64 | None]
    """Per sequence, the tokens at the begin of each segment that see one another in both directions; None where the
    source's documents are all causal."""
    exhausted: BoolArray
    """bool[sources]: whether every lane of this rank has given the source `max_epochs` times."""
    rejects: list[RejectedRecord] = field(default_factory=list)
    """Records skipped while this batch was made."""
    wait_s: float = 0.0
    """Seconds the consumer waited for this batch."""

    @cached_property
    def digests(self) -> list[bytes]:
        """Per sequence, its SHA-256."""
        words = self.tokens.astype("<u4").data.cast("B")
        size = 4 * self.tokens.shape[1]
        rows = zip(self.source_ids.tolist(), self.starts, self.weights, self.prefix_lengths, strict=True)
        return [
            sequence_digest(source, starts, words[row * size : (row + 1) * size], weights, prefixes)
            for row, (source, starts, weights, prefixes) in enumerate(rows)
        ]

    @cached_property
    def _layout(self) -> tuple[Int32, Int64, Int64, BoolArray]:
        return layout(self.starts, self.segment_ids, self.tokens.shape[1])

    @property
    def cu_seqlens(self) -> Int32:
        """int32[documents + 1]: cumulative document lengths over the flattened inputs [b · seq_len]."""
        return self._layout[0]

    @property
    def document_ids(self) -> Int64:
        """int64[documents]: the document of each `cu_seqlens` segment."""
        return self._layout[1]

    @property
    def document_prefix_lengths(self) -> Int64:
        """int64[documents]: tokens at the begin of each `cu_seqlens` segment that see one another both ways."""
        width = self.tokens.shape[1] - 1
        found = [np.zeros(0, np.int64)]
        for starts, prefixes in zip(self.starts, self.prefix_lengths, strict=True):
            seen = starts < width
            found.append(np.zeros(int(seen.sum()), np.int64) if prefixes is None else prefixes[seen])
        return np.concatenate(found)

    @property
    def position_ids(self) -> Int64:
        """int64[b, seq_len]: positions, from 0 at each document's first token in the sequence."""
        return self._layout[2]

    @cached_property
    def loss_mask(self) -> BoolArray:
        """bool[b, seq_len]: False where the next token belongs to another document or has no weight."""
        mask = self._layout[3]
        for row, weights in enumerate(self.weights):
            if weights is not None:
                mask[row] &= weights[1:] > 0
        return mask

    @cached_property
    def loss_weights(self) -> Float32:
        """float32[b, seq_len]: weight of each prediction in the loss, 0 where `loss_mask` is False."""
        weighted = self.loss_mask.astype(np.float32)
        for row, weights in enumerate(self.weights):
            if weights is not None:
                weighted[row] *= weights[1:]
        return weighted
