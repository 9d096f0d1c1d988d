"""The loss of a language model's head on a chunk of logits, and the logits' gradient in their place.

    reported  = log Z - x[label]                                    log Z = logsumexp(x), per token, natural log
    minimised = reported + z_loss·log²Z + max_z_loss·(max x)²       (arXiv 2204.02311 section 5; 2309.10305 section 2.4)
    gradient of Σ weight·minimised, the first of several equal maxima taking max_z_loss's part

`fused_` goes through a row once while it is in the cache: it reads and writes every logit once (4 bytes in bf16), where
torch in eager mode reads and writes it a dozen times in fp32. It counts besides, per source of data, in whole numbers,
so that the order of rows, their division into chunks and the split of the vocabulary over ranks change no bit:

    counters int64[sources, 5]: tokens, Σ round(loss·loss_unit), Σ round(z terms·2^32), tokens whose label had the
    largest logit, tokens whose loss was not finite (not in the sums)

Tokens with the label `ignore_index` have no loss, no gradient and are counted nowhere.

A vocabulary split over ranks takes two steps with a collective in between: `statistics_` of every rank's columns,
gathered by the caller, then `gradient_` with those of all. The matrix products are `linear_cross_entropy.py`'s.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from parallel.kernels import extension
from parallel.kernels.choice import Kernel

DTYPES = (torch.float32, torch.bfloat16)
"""What the fused form takes."""
KERNEL = Kernel("head", ("head_chunk_", "head_statistics", "head_gradient_"), faster_on=frozenset({"cpu"}))
"""CUDA is missing in `faster_on` because no GPU was at hand: there `auto` is torch until somebody has measured."""
IGNORE_INDEX = -100
LOSS_UNIT = 2**24
"""Losses are counted in units of 1/LOSS_UNIT where the caller says nothing else: 16 million tokens of 12 nats are 3e15
of the 9e18 that fit."""
Z_UNIT = 2**32
"""z-loss terms are counted in units of 1/Z_UNIT, since they are that much smaller."""
COUNTERS = ("tokens", "loss", "z_terms", "correct", "not_finite")
"""Columns of `counters`."""
PARTS = 16
"""Sums over a row of the whole vocabulary are made in so many parts, see csrc/head.h."""
MOST_RANKS = 32
MOST_COLUMNS = 2**24


class Losses(NamedTuple):
    """Of each row; fp32[rows] from the fused form."""

    reported: torch.Tensor
    minimised: torch.Tensor
    logit_sums: torch.Tensor
    """Sum of the row's logits, this rank's columns only."""


def reference(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    sources: torch.Tensor,
    num_sources: int,
    *,
    z_loss: float = 0.0,
    max_z_loss: float = 0.0,
    loss_unit: float = LOSS_UNIT,
    ignore_index: int = IGNORE_INDEX,
) -> tuple[Losses, torch.Tensor, torch.Tensor]:
    """(losses, gradient of the logits, counters) by torch's own operators, all in the logits' dtype; float64 too.

    Takes what `fused_` takes, and leaves the logits as they are. Written for clearness: the training path in torch is
    `pretrain.loss.vocab_parallel_cross_entropy`.
    """
    valid = labels != ignore_index
    at = labels.clamp(min=0)[:, None]
    log_z, (highest, first) = logits.logsumexp(1), logits.max(dim=1)
    reported = -torch.log_softmax(logits, dim=1).gather(1, at)[:, 0].where(valid, 0.0)
    terms = (z_loss * log_z.square() + max_z_loss * highest.square()).where(valid, 0.0)
    weight = weights.to(logits.dtype).where(valid, 0.0)
    gradient = torch.softmax(logits, dim=1) * (weight * (1.0 + 2.0 * z_loss * log_z))[:, None]
    gradient.scatter_add_(1, at, -weight[:, None])
    if max_z_loss:
        gradient.scatter_add_(1, first[:, None], (weight * 2.0 * max_z_loss * highest)[:, None])
    gradient[weight == 0.0] = 0.0
    finite = valid & reported.isfinite()
    rows = (
        valid.long(),
        (reported.double() * loss_unit).where(finite, 0.0).round().long(),
        (terms.double() * Z_UNIT).where(finite, 0.0).round().long(),
        (finite & (first == labels)).long(),
        (valid & ~finite).long(),
    )
    counters = torch.zeros(num_sources, len(COUNTERS), dtype=torch.int64, device=logits.device)
    counters.index_add_(0, sources[valid], torch.stack(rows, dim=1)[valid])
    return Losses(reported, reported + terms, logits.sum(dim=1)), gradient, counters


def fused_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    sources: torch.Tensor,
    counters: torch.Tensor,
    *,
    z_loss: float = 0.0,
    max_z_loss: float = 0.0,
    loss_unit: float = LOSS_UNIT,
    ignore_index: int = IGNORE_INDEX,
    gradient: bool = True,
) -> Losses:
    """The losses of a chunk of rows; `logits` become their gradient (unless `gradient` is False), `counters` grow.

    logits    contiguous fp32 or bf16 [rows, vocabulary]
    labels    int64[rows]; a label outside of the vocabulary makes the loss NaN
    weights   fp32[rows], factor of each row's minimised loss in what the gradient is of
    sources   int64[rows], counters int64[sources, 5]; both contiguous

    No host sync, and no autograd: the gradient is here already. Raises TypeError and ValueError for what does not fit.
    """
    _check(logits, labels, weights, sources, counters)
    losses: torch.Tensor = torch.ops.headrace.head_chunk_(
        logits, labels, weights, sources, counters, z_loss, max_z_loss, float(loss_unit), ignore_index, gradient
    )
    return Losses(*losses)


def parts(ranks: int) -> int:
    """Parts that each of `ranks` sums its columns in. Raises ValueError for more ranks than there are parts."""
    if ranks > MOST_RANKS:
        raise ValueError(f"fused head: the vocabulary is split over {ranks} ranks; it takes {MOST_RANKS} at most")
    return max(1, PARTS // ranks)


def statistics(
    logits: torch.Tensor, labels: torch.Tensor, rank: int, ranks: int, ignore_index: int = IGNORE_INDEX
) -> torch.Tensor:
    """What other ranks must know of this `rank`'s columns of every row: fp32[rows, 2·parts + 3], see csrc/head.h.

    `logits` [rows, vocabulary / ranks] are only read.
    """
    _check(logits, labels)
    found: torch.Tensor = torch.ops.headrace.head_statistics(
        logits, labels, rank * logits.size(1), ranks, parts(ranks), ignore_index
    )
    return found


def gradient_(
    logits: torch.Tensor,
    gathered: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    sources: torch.Tensor,
    counters: torch.Tensor,
    rank: int,
    *,
    z_loss: float = 0.0,
    max_z_loss: float = 0.0,
    loss_unit: float = LOSS_UNIT,
    ignore_index: int = IGNORE_INDEX,
    gradient: bool = True,
) -> Losses:
    """`fused_` for this `rank`'s columns, given the `statistics` of all ranks, fp32[ranks, rows, 2·parts + 3].

    Every rank gets the same losses and counters, those of the whole vocabulary.
    """
    _check(logits, labels, weights, sources, counters)
    losses: torch.Tensor = torch.ops.headrace.head_gradient_(
        logits,
        gathered,
        labels,
        weights,
        sources,
        counters,
        rank * logits.size(1),
        z_loss,
        max_z_loss,
        float(loss_unit),
        ignore_index,
        gradient,
    )
    return Losses(*losses)


def _check(logits: torch.Tensor, labels: torch.Tensor, *rest: torch.Tensor) -> None:
    """`rest`: weights, sources, counters."""
    if logits.dtype not in DTYPES:
        raise TypeError(f"fused head: logits are {logits.dtype}; it takes torch.float32 and torch.bfloat16")
    if logits.dim() != 2 or not 0 < logits.size(1) <= MOST_COLUMNS:
        raise ValueError(
            f"fused head: logits have shape {list(logits.shape)}; they are [rows, columns], 1 to 2^24 columns"
        )
    rows = logits.size(0)
    wanted: Sequence[tuple[str, torch.Tensor, torch.dtype, tuple[int, ...]]] = [
        ("labels", labels, torch.int64, (rows,)),
        *zip(("weights", "sources"), rest[:2], (torch.float32, torch.int64), ((rows,), (rows,)), strict=False),
        *(("counters", each, torch.int64, (each.size(0) if each.dim() else 0, len(COUNTERS))) for each in rest[2:]),
    ]
    for name, tensor, dtype, shape in wanted:
        if tensor.dtype != dtype:
            raise TypeError(f"fused head: {name} are {tensor.dtype}; it takes {dtype}")
        if tensor.shape != shape:
            raise ValueError(f"fused head: {name} have shape {list(tensor.shape)}, not {list(shape)}")
        if tensor.device != logits.device:
            raise ValueError(f"fused head: {name} are on {tensor.device}, logits on {logits.device}")
    for name, tensor in [("logits", logits), *((name, tensor) for name, tensor, _, _ in wanted)]:
        if not tensor.is_contiguous():
            raise ValueError(
                f"fused head: {name} of shape {list(tensor.shape)} have strides {list(tensor.stride())}; "
                "call .contiguous() on them"
            )


def _losses_shape(logits: torch.Tensor, *_: object) -> torch.Tensor:
    return logits.new_empty((3, logits.size(0)), dtype=torch.float32)


def _statistics_shape(
    logits: torch.Tensor, labels: torch.Tensor, first_column: int, ranks: int, parts: int, ignore_index: int
) -> torch.Tensor:
    return logits.new_empty((logits.size(0), 2 * parts + 3), dtype=torch.float32)


def _register() -> None:
    """Tell torch the operators' shapes; their code is in the library already."""
    torch.library.register_fake("headrace::head_chunk_", _losses_shape)
    torch.library.register_fake("headrace::head_gradient_", _losses_shape)
    torch.library.register_fake("headrace::head_statistics", _statistics_shape)


if extension.has(*KERNEL.operators):
    _register()
