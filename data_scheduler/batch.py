"""What the scheduler hands to the trainer: packed sequences, and the batch they form on one data-parallel rank."""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_scheduler.order import Int64

Int32 = npt.NDArray[np.int32]

ORDINAL_BITS = 24
"""A document id is chunk number << 24 | place in its unit: unique in a source, resolved by `headrace data trace`."""


class Segments(NamedTuple):
    """Which documents are where in a packed sequence."""

    starts: Int32
    """int32[segments]: where each document begins in the sequence; the first is 0."""
    document_ids: Int64
    """int64[segments]"""
    offset: int
    """Token of the first document that stands at position 0; the other documents begin at their own token 0."""


def sequence_digest(source_id: int, starts: Int32, tokens: Int64) -> bytes:
    """SHA-256 over source id, document boundaries and token ids (little-endian 32-bit), 32 bytes."""
    head = np.array([source_id, len(starts)], dtype="<u4").tobytes()
    return hashlib.sha256(head + starts.astype("<i4").tobytes() + tokens.astype("<u4").tobytes()).digest()


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
    """The sequences of one step on one data-parallel rank, in global order (slot i belongs to rank i mod dp_size)."""

    step: int
    tokens: Int64
    """int64[b, seq_len + 1]; the model sees [:, :-1] and predicts [:, 1:]."""
    starts: list[Int32]
    """Per sequence, where documents begin within its seq_len + 1 tokens."""
    source_ids: Int64
    """int64[b]: place of the source in the configuration."""
    segment_ids: list[Int64]
    """Per sequence, the document id of each segment."""
    offsets: Int64
    """int64[b]: token of the first document at which the sequence begins."""
    slots: Int64
    """int64[b]: place of each sequence in the global batch."""
    digests: list[bytes]
    """Per sequence, its SHA-256."""
    rejects: list[RejectedRecord] = field(default_factory=list)
    """Records skipped while this batch was made."""
    wait_s: float = 0.0
    """Seconds the consumer waited for this batch."""

    @cached_property
    def cu_seqlens(self) -> Int32:
        """int32[documents + 1]: cumulative document lengths over the flattened inputs [b · seq_len]."""
        seq_len = self.tokens.shape[1] - 1
        rows = [starts[starts < seq_len] + row * seq_len for row, starts in enumerate(self.starts)]
        return np.concatenate([*rows, [len(self.starts) * seq_len]]).astype(np.int32)

    @cached_property
    def document_ids(self) -> Int64:
        """int64[documents]: the document of each `cu_seqlens` segment."""
        seq_len = self.tokens.shape[1] - 1
        return np.concatenate(
            [ids[starts < seq_len] for ids, starts in zip(self.segment_ids, self.starts, strict=True)]
        )

    @cached_property
    def position_ids(self) -> Int64:
        """int64[b, seq_len]: positions, from 0 at each document's first token in the sequence."""
        b, width = self.tokens.shape
        edges = self.cu_seqlens.astype(np.int64)
        flat = np.arange(b * (width - 1)) - np.repeat(edges[:-1], np.diff(edges))
        return flat.reshape(b, width - 1)

    @cached_property
    def loss_mask(self) -> npt.NDArray[np.bool_]:
        """bool[b, seq_len]: False where the next token belongs to another document."""
        mask = np.ones((self.tokens.shape[0], self.tokens.shape[1] - 1), dtype=np.bool_)
        for row, starts in enumerate(self.starts):
            mask[row, starts[1:] - 1] = False
        return mask
