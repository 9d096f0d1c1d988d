"""Micro-batches of what was chosen: documents without a chosen token go, the others move together.

Documents never attend to one another and positions begin anew in each, so where in a row one stands changes nothing but
the order of additions. A document is never cut for this, since its tokens would lose what they look back at.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from pretrain.microbatch import MicroBatch
from pretrain.selection import BoolArray, Int64

PAD = 256
"""Tokens of a document of padding: attention over a long one would cost what was saved."""


def masked(microbatches: Sequence[MicroBatch], chosen: BoolArray) -> list[MicroBatch]:
    """The micro-batches where only `chosen` tokens carry loss. chosen: bool[micro-batches, tokens]."""
    return [
        replace(microbatch, loss_mask=microbatch.loss_mask & torch.from_numpy(row)[None])
        for microbatch, row in zip(microbatches, chosen, strict=True)
    ]


def lay_out(lengths: Int64, room: int) -> list[list[int]]:
    """Numbers of the documents in each row of `room` tokens, best-fit decreasing; a document is at most that long."""
    rows: list[list[int]] = []
    gaps: list[tuple[int, int]] = []
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        at = bisect_left(gaps, (length, -1))
        if at == len(gaps):
            rows.append([])
            gap, row = room, len(rows) - 1
        else:
            gap, row = gaps.pop(at)
        rows[row].append(document)
        if gap > length:
            insort(gaps, (gap - length, row))
    return [sorted(row) for row in rows]


def repack(microbatches: Sequence[MicroBatch], chosen: BoolArray) -> list[MicroBatch]:
    """As few micro-batches of the same size as hold every document with a chosen token. May be none.

    chosen: bool[micro-batches, tokens]; tokens that are not chosen, or carry no loss, stay as context.
    """
    tokens = microbatches[0].input_ids.size(1)
    edges = np.concatenate([number * tokens + each.cu_seqlens.numpy()[:-1] for number, each in enumerate(microbatches)])
    lengths = np.diff(np.append(edges, len(microbatches) * tokens)).astype(np.int64)
    mask = torch.cat([microbatch.loss_mask[0] for microbatch in microbatches]).numpy() & chosen.reshape(-1)
    kept = np.flatnonzero(np.logical_or.reduceat(mask, edges))
    columns = {
        "input_ids": torch.cat([each.input_ids[0] for each in microbatches]).numpy(),
        "labels": torch.cat([each.labels[0] for each in microbatches]).numpy(),
        "loss_mask": mask,
        "sources": torch.cat([each.token_sources for each in microbatches]).numpy(),
    }
    if any(each.loss_weights is not None for each in microbatches):
        ones = torch.ones(tokens)
        columns["loss_weights"] = torch.cat(
            [ones if each.loss_weights is None else each.loss_weights[0] for each in microbatches]
        ).numpy()
    rows = lay_out(lengths[kept], tokens)
    prefixes = _prefixes(microbatches, len(edges))
    packed = []
    for row in rows:
        own = kept[row]
        pieces = list(zip(edges[own].tolist(), lengths[own].tolist(), strict=True))
        packed.append(_row(columns, pieces, microbatches[0], None if prefixes is None else prefixes[own]))
    return packed


def _prefixes(microbatches: Sequence[MicroBatch], documents: int) -> Int64 | None:
    """int64[documents]: tokens of each that see one another in both directions; None when there are none."""
    if all(each.prefix_lengths is None for each in microbatches):
        return None
    each_one = [
        np.zeros(len(each.cu_seqlens) - 1, np.int64) if each.prefix_lengths is None else each.prefix_lengths.numpy()
        for each in microbatches
    ]
    found = np.concatenate(each_one).astype(np.int64)
    assert len(found) == documents, f"{len(found)} prefixes for {documents} documents"
    return found


def empty(like: MicroBatch) -> MicroBatch:
    """A micro-batch of padding, of the same size."""
    return _row({name: np.zeros(0, np.int64) for name in ("input_ids", "labels", "loss_mask", "sources")}, [], like)


def _row(  # type: ignore[type-arg]
    columns: dict[str, np.ndarray], pieces: list[tuple[int, int]], like: MicroBatch, prefixes: Int64 | None = None
) -> MicroBatch:
    """One micro-batch from (begin, length) of documents in the columns, and padding."""
    tokens, pad = like.input_ids.size(1), min(PAD, like.seq_len)
    lengths = [length for _, length in pieces]
    room = tokens - sum(lengths)
    lengths += [min(pad, room - at) for at in range(0, room, pad)]
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])

    def column(name: str, dtype: type) -> torch.Tensor:
        row = np.zeros(tokens, dtype)
        for at, (begin, length) in zip(cu_seqlens.tolist(), pieces, strict=False):
            row[at : at + length] = columns[name][begin : begin + length]
        return torch.from_numpy(row)

    return MicroBatch(
        input_ids=column("input_ids", np.int64)[None],
        labels=column("labels", np.int64)[None],
        loss_mask=column("loss_mask", np.bool_)[None],
        position_ids=torch.from_numpy(np.arange(tokens) - np.repeat(cu_seqlens[:-1], lengths))[None],
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        max_seqlen=max(lengths),
        source_ids=torch.zeros_like(like.source_ids),
        loss_weights=column("loss_weights", np.float32)[None] if "loss_weights" in columns else None,
        repacked_sources=column("sources", np.int64),
        prefix_lengths=None if prefixes is None else _padded(prefixes, len(lengths)),
    )


def _padded(prefixes: Int64, documents: int) -> torch.Tensor:
    """int32[documents]: the prefixes of a row's documents, none of its padding."""
    return torch.from_numpy(np.append(prefixes, np.zeros(documents - len(prefixes), np.int64)).astype(np.int32))
