"""The model's head and loss in one, `kernels: {head: fused}`: the logits of all tokens are never there.

What a chunk with `fused_head` gives for a micro-batch depends on what it is asked:

    labels and LossInputs        (the sum to minimise, report), as `pretrain.loss.loss_function` would give them
    labels, without gradients    (reported, minimised), of every token: what selections score with
    labels, with gradients       the same, through torch's operators: what the gradient will be of is not known yet
    no labels                    logits
"""

from typing import Any

import torch

from headrace.errors import ConfigError
from parallel import accelerator
from parallel.kernels import head
from parallel.kernels.choice import choose
from parallel.kernels.linear_cross_entropy import Head, HeadLoss
from parallel.layout import Layout
from parallel.output_layer import OutputLayer, Targets
from pretrain.config import KernelsConfig
from pretrain.loss import FIXED_POINT, LossInputs


def head_is_fused(kernels: KernelsConfig, dtype: torch.dtype, layout: Layout) -> bool:
    """Whether the last chunk's head is the fused one. Raises ConfigError when `fused` is asked for and cannot be."""
    problem = ""
    if dtype not in head.DTYPES:
        problem = "does not take fp16"  # its loss is scaled by a factor that the forward pass does not know
    elif layout.tensor_parallel_size > head.MOST_RANKS:
        problem = f"takes tensor_parallel_size up to {head.MOST_RANKS}"
    if problem:
        if kernels.head == "fused":
            raise ConfigError(f"kernels.head: fused {problem}; leave the key out")
        return False
    return choose(head.KERNEL, kernels.head, accelerator.device().type)[0] == "fused"


def fuse_head(chunk: Any, layout: Layout) -> None:
    """Have the output layer of `chunk`, the last one, give losses."""
    tp = layout.tensor_parallel_size
    how = Head(
        z_loss=chunk.z_loss,
        max_z_loss=chunk.max_z_loss,
        loss_unit=FIXED_POINT,
        group=chunk.pg_collection.tp if tp > 1 else None,
        sequence_parallel=layout.sequence_parallel and tp > 1,
        # Gradients of gathered weights are reduced when autograd has them, and main_grad is of the shards.
        accumulate=not layout.fully_sharded,
        # A tied embedding on the same rank gives autograd a gradient of its own, which must be added.
        placeholder=layout.overlap_grad_reduce and chunk.output_layer.weight is not None,
    )
    OutputLayer.adopt(chunk.output_layer, how)


def summed_losses(chunk: Any, inputs: dict[str, Any], summed_with: LossInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """(the sum to minimise float32[], report int64[3 or 6, sources]) of a micro-batch."""
    labels = inputs["labels"].masked_fill(~summed_with.loss_mask, head.IGNORE_INDEX)
    own, ahead = summed_with.loss_weights
    total, counters = _loss(chunk, inputs["hidden_states"], labels[0], None if own is None else own[0], summed_with)
    report = _report(counters)
    depth = labels.size(0) - 1
    if not depth:
        return total, report
    factor = summed_with.head_weight / depth
    weights = torch.full(labels[1:].shape, factor, device=labels.device) if ahead is None else ahead * factor
    heads = chunk.multi_token_heads(inputs["hidden_states"], inputs["packed_seq_params"])
    found = [_loss(chunk, *each, summed_with) for each in zip(heads, labels[1:], weights, strict=True)]
    for each, _ in found:
        total = total + each
    return total, torch.cat([report, sum((_report(each) for _, each in found), torch.zeros_like(report))])


def token_losses(chunk: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """(reported, minimised) float32[1, tokens] each, of the model's own labels, without gradients."""
    labels = inputs["labels"][0]
    targets = Targets(labels, None, torch.zeros_like(labels), num_sources=1)
    loss = _output(chunk, inputs["hidden_states"], targets)
    return loss.reported[None], loss.minimised[None]


def _loss(
    chunk: Any, hidden: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None, summed_with: LossInputs
) -> tuple[torch.Tensor, torch.Tensor]:
    loss = _output(chunk, hidden, Targets(labels, weights, summed_with.source_ids, summed_with.num_sources))
    return loss.total, loss.counters


def _output(chunk: Any, hidden: torch.Tensor, targets: Targets) -> HeadLoss:
    weight = chunk.shared_embedding_or_output_weight() if chunk.share_embeddings_and_output_weights else None
    loss: HeadLoss = chunk.output_layer(hidden, weight=weight, targets=targets)
    return loss


def _report(counters: torch.Tensor) -> torch.Tensor:
    """The rows of a `SourceLoss` from the head's counters."""
    columns = [head.COUNTERS.index(name) for name in ("loss", "tokens", "not_finite")]
    return counters[:, columns].t().contiguous()
