"""Micro-batches: a rank's share of the global batch, cut into pieces that one forward pass takes.

Two sequences of 4 tokens (so 5 in the batch), documents starting at 0 and 3 in the first:

    tokens        a a a | b b      c c c c c
    input_ids     a a a   b        c c c c          one row, int64[1, 8]
    labels        a a b   b        c c c c          the next token
    loss_mask     1 1 0   1        1 1 1 1          no document predicts the next one's first token
    position_ids  0 1 2   0        0 1 2 3
    cu_seqlens    0       3        4       8
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class MicroBatch:
    """`m` sequences of `S` tokens in one row, on the CPU."""

    input_ids: torch.Tensor
    """int64[1, m·S]"""
    labels: torch.Tensor
    """int64[1, m·S]: the token that follows each input."""
    loss_mask: torch.Tensor
    """bool[1, m·S]: False where the label belongs to another document than the input, or carries no loss."""
    position_ids: torch.Tensor
    """int64[1, m·S]: from 0 in every document."""
    cu_seqlens: torch.Tensor
    """int32[documents + 1]: where documents start in the row, and its end."""
    max_seqlen: int
    """Tokens of the longest document."""
    source_ids: torch.Tensor
    """int64[m]: each sequence's source."""
    loss_weights: torch.Tensor | None = None
    """float32[1, m·S]: weight of each label in what is minimised; None: all 1."""
    repacked_sources: torch.Tensor | None = None
    """int64[m·S]: each token's source, where documents of several sources were packed into one row again; `source_ids`
    then means nothing but the number of rows."""
    prefix_lengths: torch.Tensor | None = None
    """int32[documents]: inputs at the begin of each document that see one another both ways; None: there are none."""

    @property
    def seq_len(self) -> int:
        """Tokens of each sequence."""
        return self.input_ids.size(1) // self.source_ids.size(0)

    @property
    def token_sources(self) -> torch.Tensor:
        """int64[m·S]: each token's source."""
        if self.repacked_sources is not None:
            return self.repacked_sources
        return self.source_ids.repeat_interleave(self.seq_len)


def split_batch(
    tokens: Int64,
    starts: Sequence[Int32],
    source_ids: Int64,
    micro_batch_size: int,
    weights: Sequence[Float32 | None] | None = None,
    prefix_lengths: Sequence[Int64 | None] | None = None,
) -> list[MicroBatch]:
    """A rank's batch as micro-batches of `micro_batch_size` sequences, in order.

    `tokens` int64[b, S+1]; `starts[i]` int32, ascending, where documents start among sequence i's S+1 tokens, the first
    being 0; `source_ids` int64[b]; `weights[i]` float32[S+1], the weight of each token in the loss, None where all are
    1; `prefix_lengths[i]` int64, as many as its starts: tokens at the begin of each document that see one another both
    ways and carry no loss, None where there are none. `b` must be a multiple of `micro_batch_size`.
    """
    size, length = tokens.shape
    assert size == len(starts) == len(source_ids), f"{size} sequences, {len(starts)} starts, {len(source_ids)} sources"
    assert size % micro_batch_size == 0, f"{size} sequences do not make micro-batches of {micro_batch_size}"
    weights = weights or [None] * size
    prefixes = prefix_lengths or [None] * size
    return [
        _micro_batch(tokens[part], starts[part], source_ids[part], weights[part], prefixes[part], length - 1)
        for part in (slice(at, at + micro_batch_size) for at in range(0, size, micro_batch_size))
    ]


def _micro_batch(
    tokens: Int64,
    starts: Sequence[Int32],
    source_ids: Int64,
    weights: Sequence[Float32 | None],
    prefixes: Sequence[Int64 | None],
    seq_len: int,
) -> MicroBatch:
    rows = len(tokens)
    loss_mask = np.ones((rows, seq_len), dtype=np.bool_)
    bounds = []
    seen_ahead: list[Int64] = []
    for row, row_starts in enumerate(starts):
        assert len(row_starts), f"sequence {row} has no document"
        assert row_starts[0] == 0, f"sequence {row} starts inside a document: {row_starts[0]}"
        inner = np.asarray(row_starts[1:], dtype=np.int64)
        loss_mask[row, inner - 1] = False  # the label of the token before a start is that start
        # A document that starts at the very last token is only ever a label.
        bounds.append(row * seq_len + np.concatenate(([0], inner[inner < seq_len])))
        seen_ahead.append(_seen_ahead(row_starts, prefixes[row], loss_mask[row]))
    loss_weights = None
    if any(row_weights is not None for row_weights in weights):
        loss_weights = np.ones((rows, seq_len), dtype=np.float32)
        for row, row_weights in enumerate(weights):
            if row_weights is not None:
                loss_weights[row] = row_weights[1:]
        loss_mask &= loss_weights > 0
    cu_seqlens = np.concatenate((*bounds, [rows * seq_len]))
    lengths = np.diff(cu_seqlens)
    positions = np.arange(rows * seq_len) - np.repeat(cu_seqlens[:-1], lengths)
    return MicroBatch(
        input_ids=torch.from_numpy(np.ascontiguousarray(tokens[:, :-1], dtype=np.int64).reshape(1, -1)),
        labels=torch.from_numpy(np.ascontiguousarray(tokens[:, 1:], dtype=np.int64).reshape(1, -1)),
        loss_mask=torch.from_numpy(loss_mask.reshape(1, -1)),
        position_ids=torch.from_numpy(positions.astype(np.int64).reshape(1, -1)),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        max_seqlen=int(lengths.max()),
        source_ids=torch.from_numpy(np.array(source_ids, dtype=np.int64)),
        loss_weights=None if loss_weights is None else torch.from_numpy(loss_weights.reshape(1, -1)),
        prefix_lengths=torch.from_numpy(seen.astype(np.int32)) if (seen := np.concatenate(seen_ahead)).any() else None,
    )


def _seen_ahead(starts: Int32, prefixes: Int64 | None, loss_mask: npt.NDArray[np.bool_]) -> Int64:
    """Prefixes of a row's documents that are inputs; labels inside them lose their loss in `loss_mask`, bool[S]."""
    seq_len = len(loss_mask)
    starts = starts[starts < seq_len]
    if prefixes is None:
        return np.zeros(len(starts), np.int64)
    prefixes = prefixes[: len(starts)]
    for start, length in zip(starts.tolist(), prefixes.tolist(), strict=True):
        loss_mask[start : start + max(0, length - 1)] = False
    return np.minimum(prefixes, np.diff(np.append(starts, seq_len)))
