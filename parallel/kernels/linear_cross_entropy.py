"""A language model's output layer and its loss in one, without the logits of all tokens: chunk by chunk of tokens

    logits = hidden · weightᵀ ──► loss, counters, and the logits' gradient in their place (head.py)
    gradient of hidden = that · weight,    gradient of weight += thatᵀ · hidden

so that of tokens × vocabulary only one chunk is ever there: 0.3 GB on a CPU, 1.2 GB on a GPU, where 4,096 tokens of a
vocabulary of 139,776 have 1.1 GB of logits in bf16 and torch keeps two to three copies in fp32. Matrix products are
torch's, three for each chunk, as without chunks: nothing is computed twice.

Gradients are made in the forward pass, so what they are of must be known there: `Σ token_weights · minimised`, which
is `HeadLoss.total`. The weight's gradient is summed in fp32, right in `main_grad` where the weight has one (megatron's
buffer, which takes gradients of all micro-batches): no further buffer, and no pass over it; the total must then be
differentiated with a factor of 1, which is asserted.

    ranks     what each has                             talks about
    tp        vocabulary / tp rows of the weight        statistics of each chunk (140 bytes a token, all-gather), and
                                                        the gradient of hidden at the end (all-reduce)
    tp + sp   and tokens / tp of hidden                 hidden at the start (all-gather), its gradient (reduce-scatter)
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from parallel.kernels import head
from parallel.kernels.head_chunks import WORKSPACE_BYTES, WORKSPACE_BYTES_CPU, chunk_rows
from parallel.kernels.self_test import Trial


class HeadLoss(NamedTuple):
    """What a batch of tokens costs. Of the tensors only `total` has a gradient."""

    total: torch.Tensor
    """fp32[], Σ token_weights · minimised over tokens that are not ignored."""
    reported: torch.Tensor
    """fp32[tokens]"""
    minimised: torch.Tensor
    """fp32[tokens]"""
    counters: torch.Tensor
    """int64[sources, 5], see head.py; the same on all ranks of the group."""
    logit_sum: torch.Tensor
    """fp64[], of this rank's logits of all tokens."""


@dataclass(frozen=True)
class Head:
    """How the loss is made; everything that is not a tensor of the batch."""

    z_loss: float = 0.0
    max_z_loss: float = 0.0
    loss_unit: float = head.LOSS_UNIT
    ignore_index: int = head.IGNORE_INDEX
    group: Any = None
    """Ranks that share the vocabulary; None: this process has all of it."""
    sequence_parallel: bool = False
    """Each rank of the group has a piece of the tokens, in rank order; labels and the rest are of all tokens."""
    accumulate: bool = False
    """Add the weight's gradient to `weight.main_grad` where there is one."""
    placeholder: bool = False
    """Give autograd an empty gradient of the weight all the same, and say `grad_added_to_main_grad`: megatron's
    overlapped reduction asks for it."""
    workspace_bytes: int | None = None
    """Size of a chunk's logits; None: as the device asks."""


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    token_weights: torch.Tensor | None,
    sources: torch.Tensor,
    num_sources: int,
    options: Head = Head(),
) -> HeadLoss:
    """The loss of every token and of all, from the model's last hidden states.

    hidden         [tokens, width] fp32 or bf16, this rank's piece with `sequence_parallel`; token_weights fp32[tokens]
    weight         [vocabulary / ranks, width], the same dtype
    labels         int64[tokens], over the whole vocabulary; ignore_index: no loss
    sources        int64[tokens], below num_sources

    No host sync. Raises TypeError and ValueError for what does not fit.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.size(1) != weight.size(1):
        raise ValueError(
            f"fused head: hidden {list(hidden.shape)} and weight {list(weight.shape)} must be [tokens, width] and "
            "[vocabulary, width]"
        )
    if hidden.dtype != weight.dtype:
        raise TypeError(f"fused head: hidden is {hidden.dtype}, weight {weight.dtype}; they must be the same")
    if token_weights is None:
        token_weights = torch.ones(labels.shape, device=hidden.device)
    outputs = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, labels, token_weights, sources, num_sources, options, torch.is_grad_enabled()
    )
    return HeadLoss(*outputs)


def reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    token_weights: torch.Tensor,
    z_loss: float = 0.0,
    max_z_loss: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(total, reported) by torch's own operators and autograd, for a vocabulary that is not split; float64 too."""
    logits = torch.mm(hidden, weight.t())
    scores = logits if logits.dtype == torch.float64 else logits.float()
    reported = F.cross_entropy(scores, labels, reduction="none", ignore_index=head.IGNORE_INDEX)
    terms = z_loss * scores.logsumexp(1).square() + max_z_loss * scores.amax(1).square()
    minimised = reported + terms.where(labels != head.IGNORE_INDEX, 0.0)
    return (minimised * token_weights).sum(), reported.detach()


def _trial_inputs() -> tuple[torch.Tensor, ...]:
    tokens, width, vocabulary = 256, 64, 8192
    weight = torch.randn(vocabulary, width, dtype=torch.float64) / 8
    return torch.randn(tokens, width, dtype=torch.float64), weight, torch.randint(0, vocabulary, (tokens,))


def _trial_fused(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return linear_cross_entropy(hidden, weight, labels, None, torch.zeros_like(labels), 1, Head(z_loss=1e-4))[:2]


def _trial_reference(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return reference(hidden, weight, labels, torch.ones(labels.shape, device=labels.device), z_loss=1e-4)


TRIAL = Trial(head.KERNEL, _trial_inputs, _trial_fused, _trial_reference)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        token_weights: torch.Tensor,
        sources: torch.Tensor,
        num_sources: int,
        options: Head,
        grad_enabled: bool,
    ) -> tuple[torch.Tensor, ...]:
        whole = _gathered(hidden, options.group) if options.sequence_parallel else hidden.contiguous()
        tokens = whole.size(0)
        counters = torch.zeros(num_sources, len(head.COUNTERS), dtype=torch.int64, device=hidden.device)
        needs_hidden, needs_weight = (grad_enabled and each for each in ctx.needs_input_grad[:2])
        main_grad = getattr(weight, "main_grad", None) if options.accumulate else None
        grad_hidden = torch.empty_like(whole) if needs_hidden else None
        grad_weight = None
        if needs_weight:
            grad_weight = torch.zeros_like(weight, dtype=torch.float32) if main_grad is None else main_grad
        space = options.workspace_bytes or (WORKSPACE_BYTES_CPU if hidden.device.type == "cpu" else WORKSPACE_BYTES)
        rows = chunk_rows(tokens, weight.size(0), weight.element_size(), space)
        workspace = weight.new_empty(min(rows, tokens), weight.size(0))
        found = []
        for begin in range(0, tokens, rows):
            part = slice(begin, begin + rows)
            x = whole[part]
            logits = torch.mm(x, weight.t(), out=workspace[: x.size(0)])
            of_rows = (labels[part], token_weights[part], sources[part], counters)
            found.append(_losses_(logits, *of_rows, options, needs_hidden or needs_weight))
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[part])
            if grad_weight is not None:
                _add_product(grad_weight, logits, x)
        reported, minimised, logit_sums = (
            torch.cat(each) if each else hidden.new_zeros(0, dtype=torch.float32)
            for each in (zip(*found, strict=True) if found else ((), (), ()))
        )
        total = torch.where(labels != options.ignore_index, minimised * token_weights, 0.0).sum()
        ctx.main_grad, ctx.placeholder, ctx.weight = main_grad, options.placeholder, weight
        ctx.save_for_backward(
            None if grad_hidden is None else _reduced(grad_hidden, hidden, options),
            None if main_grad is not None or grad_weight is None else grad_weight,
        )
        outputs = (reported, minimised, counters, logit_sums.sum(dtype=torch.float64))
        ctx.mark_non_differentiable(*outputs)
        return total, *outputs

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        nothing = (None,) * 6
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad.to(grad_hidden.dtype)
        if not ctx.needs_input_grad[1]:
            return grad_hidden, None, *nothing
        if ctx.main_grad is None:
            return grad_hidden, (grad_weight * grad).to(ctx.weight.dtype), *nothing
        torch._assert_async(grad == 1.0, "fused head: the weight's gradient is in main_grad already, unscaled")
        if not ctx.placeholder:
            return grad_hidden, None, *nothing
        ctx.weight.grad_added_to_main_grad = True
        return grad_hidden, torch.empty_like(ctx.weight), *nothing


def _losses_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    token_weights: torch.Tensor,
    sources: torch.Tensor,
    counters: torch.Tensor,
    options: Head,
    gradient: bool,
) -> head.Losses:
    """The losses of a chunk; its logits become their gradient."""
    how = {
        "z_loss": options.z_loss,
        "max_z_loss": options.max_z_loss,
        "loss_unit": options.loss_unit,
        "ignore_index": options.ignore_index,
        "gradient": gradient,
    }
    if options.group is None or options.group.size() == 1:
        return head.fused_(logits, labels, token_weights, sources, counters, **how)  # type: ignore[arg-type]
    rank, ranks = options.group.rank(), options.group.size()
    own = head.statistics(logits, labels, rank, ranks, options.ignore_index)
    gathered = _gathered(own, options.group).view(ranks, *own.shape)
    return head.gradient_(logits, gathered, labels, token_weights, sources, counters, rank, **how)  # type: ignore[arg-type]


def _add_product(total: torch.Tensor, grad_logits: torch.Tensor, hidden: torch.Tensor) -> None:
    """total += grad_logitsᵀ · hidden in fp32, without a copy of either on a GPU."""
    transposed = grad_logits.t()
    if grad_logits.dtype == torch.float32:
        total.addmm_(transposed, hidden)
    elif grad_logits.device.type == "cpu":  # torch has no product of bf16 into fp32 there
        total.addmm_(transposed.float(), hidden.float())
    else:
        torch.addmm(total, transposed, hidden, out_dtype=torch.float32, out=total)


def _gathered(piece: torch.Tensor, group: Any) -> torch.Tensor:
    whole = piece.new_empty(piece.size(0) * group.size(), *piece.shape[1:])
    dist.all_gather_into_tensor(whole, piece.contiguous(), group=group)
    return whole


def _reduced(grad_hidden: torch.Tensor, hidden: torch.Tensor, options: Head) -> torch.Tensor:
    """The sum over the group's ranks; of this rank's piece with sequence parallelism."""
    if options.group is None or options.group.size() == 1:
        return grad_hidden
    if not options.sequence_parallel:
        dist.all_reduce(grad_hidden, group=options.group)
        return grad_hidden
    piece = torch.empty_like(hidden)
    dist.reduce_scatter_tensor(piece, grad_hidden, group=options.group)
    return piece
