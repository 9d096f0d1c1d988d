"""The loss: cross entropy over a vocabulary split across tensor-parallel ranks, with z-loss and max-z loss.

    reported  = log Z - logit[label]                              (what curves show, natural log, per token)
    minimised = reported + z_loss·log²Z + max_z_loss·(max logit)²

log Z is the log of the softmax's denominator. z-loss is PaLM's (arXiv 2204.02311, section 5), max-z loss Baichuan 2's
(arXiv 2309.10305, section 2.4).

`loss_function` is what megatron-core's schedules call. It sums, it does not average: the schedule divides gradients
by the number of tokens of the whole global batch, so splitting a batch differently changes nothing.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

FIXED_POINT = 2**20
"""Reported losses are added as whole multiples of 1/2^20: integer sums do not depend on their order, so every layout
and every number of ranks gets the same total. Rounding costs 5e-7 a token; a sum has room for 8e12 nats."""


class SourceLoss(NamedTuple):
    """Sums over tokens, by source."""

    loss_sums: torch.Tensor
    """int64[sources], summed reported loss in units of 1/FIXED_POINT."""
    tokens: torch.Tensor
    """int64[sources], tokens that counted."""
    not_finite: torch.Tensor
    """int64[sources], tokens whose loss was infinite or not a number; not part of `loss_sums`."""


def loss_function(
    losses: tuple[torch.Tensor, torch.Tensor],
    loss_mask: torch.Tensor,
    source_ids: torch.Tensor,
    num_sources: int,
    loss_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sum to minimise, number of tokens, report) of a micro-batch, as megatron-core's schedules expect them.

    `losses` are (reported, minimised), float32[1, tokens] each; `loss_mask` bool[1, tokens]; `source_ids`
    int64[tokens]. The report is int64[3, num_sources], the rows of a `SourceLoss`.

    `loss_weights` float32[1, tokens] scale what each token adds to the minimised sum; neither the number of tokens nor
    the report is weighted, so a source of weight 0.5 pulls half as hard and its curve stays comparable.
    """
    reported, minimised = losses
    if loss_weights is not None:
        minimised = minimised * loss_weights
    total = torch.where(loss_mask, minimised, 0.0).sum()
    number = loss_mask.sum(dtype=torch.int32)
    return total, number, source_report(reported.detach()[0], loss_mask[0], source_ids, num_sources)


def loss_with_heads(
    losses: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    *,
    loss_mask: torch.Tensor,
    source_ids: torch.Tensor,
    num_sources: int,
    loss_weights: torch.Tensor | None,
    head_mask: torch.Tensor,
    head_weights: torch.Tensor | None,
    head_weight: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`loss_function` of a model with multi-token heads, whose mean is added with the weight `head_weight`.

    `losses` are the main head's (reported, minimised), float32[1, tokens], and the others', float32[depth, tokens], as
    are `head_mask` (bool) and `head_weights`. Sums are divided by the number of the main head's tokens (arXiv
    2412.19437, equation 24: by the sequence's length). The report is int64[6, num_sources], the heads' rows last.
    """
    total, number, report = loss_function(losses[:2], loss_mask, source_ids, num_sources, loss_weights)
    reported, minimised = losses[2:]
    depth = reported.size(0)
    if head_weights is not None:
        minimised = minimised * head_weights
    total = total + head_weight / depth * torch.where(head_mask, minimised, 0.0).sum()
    own = source_report(reported.detach().flatten(), head_mask.flatten(), source_ids.repeat(depth), num_sources)
    return total, number, torch.cat([report, own])


@dataclass(frozen=True)
class LossInputs:
    """What the losses of a micro-batch are summed with; a model that sums them itself is given it as `loss_mask`."""

    loss_mask: torch.Tensor
    """bool[1 + depth, tokens], of the model's own labels and of those of its multi-token heads."""
    loss_weights: tuple[torch.Tensor | None, torch.Tensor | None]
    """float32[1, tokens] and float32[depth, tokens]; None: all 1."""
    source_ids: torch.Tensor
    """int64[tokens]"""
    num_sources: int
    head_weight: float
    """What the mean of the multi-token heads' losses is multiplied with."""


def summed_by_the_model(
    sums: tuple[torch.Tensor, torch.Tensor], loss_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `loss_function` or `loss_with_heads` gives, where the model's fused head has made the sums already.

    `sums` are the sum to minimise and the report; `loss_mask` is bool[1, tokens].
    """
    total, report = sums
    return total, loss_mask.sum(dtype=torch.int32), report


def source_report(
    reported: torch.Tensor, loss_mask: torch.Tensor, source_ids: torch.Tensor, num_sources: int
) -> torch.Tensor:
    """int64[3, num_sources], the rows of a `SourceLoss`; all arguments are per token."""
    finite = torch.isfinite(reported)
    fixed = torch.where(loss_mask & finite, reported.double() * FIXED_POINT, 0.0).round().long()
    rows = torch.stack((fixed, loss_mask.long(), (loss_mask & ~finite).long()))
    report = torch.zeros(3, num_sources, dtype=torch.int64, device=reported.device)
    return report.index_add_(1, source_ids, rows)


def vocab_parallel_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, group: Any, z_loss: float = 0.0, max_z_loss: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(reported, minimised) loss of every token, float32[tokens]; only the second one has a gradient.

    `logits` [tokens, vocab / tp] are this tensor-parallel rank's part of the vocabulary and are overwritten when they
    are float32; `labels` int64[tokens] count over the whole vocabulary; `group` is the tensor-parallel group.
    """
    reported, minimised = _CrossEntropy.apply(logits, labels, group, z_loss, max_z_loss)  # type: ignore[no-untyped-call]
    return reported, minimised


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, group: Any, z_loss: float, max_z_loss: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tp, rank = group.size(), group.rank()
        size = logits.size(1)
        scores = logits.float()
        local_max = scores.amax(dim=1)  # a tenth of the time of max(), which also finds where it is
        highest = local_max.clone()
        if tp > 1:
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
        local_argmax = scores.argmax(dim=1) if max_z_loss else None
        local_labels = labels - rank * size
        elsewhere = (local_labels < 0) | (local_labels >= size)
        local_labels = local_labels.masked_fill(elsewhere, 0)
        label_scores = scores.gather(1, local_labels[:, None])[:, 0] - highest
        # In place from here: the scores are the largest tensor of the model, float32[tokens, vocab / tp].
        exponentials = scores.sub_(highest[:, None]).exp_()
        sums = torch.stack((exponentials.sum(dim=1), label_scores.masked_fill_(elsewhere, 0.0)))
        if tp > 1:
            dist.all_reduce(sums, group=group)
        denominator, label_scores = sums
        log_denominator = denominator.log()
        reported = log_denominator - label_scores
        log_z = log_denominator + highest
        minimised = reported + z_loss * log_z.square() + max_z_loss * highest.square()
        ctx.mark_non_differentiable(reported)
        holder = None
        if max_z_loss:
            # The subgradient goes to one logit; where ranks tie for the maximum, to the lowest rank's.
            holder = torch.where(local_max == highest, float(rank), float(tp))
            if tp > 1:
                dist.all_reduce(holder, op=dist.ReduceOp.MIN, group=group)
            holder = (holder == rank).float()
        ctx.save_for_backward(exponentials, denominator, local_labels, elsewhere, log_z, highest, local_argmax, holder)
        ctx.coefficients, ctx.dtype = (z_loss, max_z_loss), logits.dtype
        return reported, minimised

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        exponentials, denominator, local_labels, elsewhere, log_z, highest, local_argmax, holder = ctx.saved_tensors
        z_loss, max_z_loss = ctx.coefficients
        of_softmax = grad * (1.0 + 2.0 * z_loss * log_z)
        out = exponentials.mul_((of_softmax / denominator)[:, None])
        out.scatter_add_(1, local_labels[:, None], -grad.masked_fill(elsewhere, 0.0)[:, None])
        if holder is not None:
            out.scatter_add_(1, local_argmax[:, None], (grad * 2.0 * max_z_loss * highest * holder)[:, None])
        return out.to(ctx.dtype), None, None, None, None
