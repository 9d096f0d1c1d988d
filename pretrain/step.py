"""One training step, on one screen: micro-batches in, updated weights and exact per-source losses out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from data_scheduler.stages import longest_sequence
from parallel import accelerator, process_groups
from parallel.attention import PackedDocuments, context_parallel_index, pack_documents
from parallel.engine import get_forward_backward_func
from parallel.layout import Layout
from parallel.process_groups import Ranks
from pretrain.config import RunConfig
from pretrain.loss import FIXED_POINT, loss_function, loss_with_heads
from pretrain.microbatch import MicroBatch
from pretrain.models.gpt import DTYPES, LanguageModel, build_model
from pretrain.models.multi_token import AheadLabels, labels_ahead
from pretrain.models.sizes import head_size
from pretrain.optimizer import build_optimizer, update
from pretrain.stages import StageSettings, first_settings


@dataclass
class TrainState:
    """Everything a step reads and changes."""

    chunks: list[LanguageModel]
    """The model chunks themselves; checkpoints are made of these."""
    wrapped: list[Any]
    """The same chunks, wrapped for data parallelism; steps run these."""
    optimizer: Any
    config: RunConfig
    layout: Layout
    ranks: Ranks
    num_sources: int
    stage: StageSettings
    """What holds for the step at hand; between two steps, for the one before."""


@dataclass(frozen=True)
class StepResult:
    """What a step did; the same on every rank."""

    loss: float
    """Mean reported loss of the global batch's tokens, natural log; NaN when any token's loss was not finite."""
    grad_norm: float
    """Norm of the whole gradient before clipping."""
    source_loss_sums: npt.NDArray[np.int64]
    """int64[sources]: summed loss of each source's tokens in units of 1/FIXED_POINT."""
    source_tokens: npt.NDArray[np.int64]
    """int64[sources]: tokens whose loss counted."""
    skipped: bool
    """The gradient was not finite, so the weights were left alone."""
    selected: "Selected | None" = None
    """What was trained on, where `train.selection` chose among the batch."""
    mtp_loss: float | None = None
    """Mean loss of the multi-token heads, over all they had to predict; None without them."""


@dataclass(frozen=True)
class Selected:
    """What a selection left of a step's batch; int64[sources] each, the same on every rank."""

    tokens: npt.NDArray[np.int64]
    """Tokens whose loss was minimised."""
    documents: npt.NDArray[np.int64]
    """Pieces of documents in the batch, those without a token that counts left out."""
    kept_documents: npt.NDArray[np.int64]
    """Those of them that had a token that was minimised."""


def build_state(
    config: RunConfig, layout: Layout, ranks: Ranks, vocab_size: int, num_sources: int | None = None
) -> TrainState:
    """A fresh model and optimizer on this process; process groups must be initialised."""
    train = config.train
    chunks = build_model(
        config.model,
        layout,
        longest_sequence(config.data),
        vocab_size,
        train.precision,
        train.recompute,
        train.seed,
        config.kernels,
    )
    optimizer, wrapped = build_optimizer(config.optimizer, chunks, layout, train.precision)
    sources = len(config.data.sources) if num_sources is None else num_sources
    return TrainState(chunks, wrapped, optimizer, config, layout, ranks, sources, first_settings(config))


def train_step(state: TrainState, microbatches: Sequence[MicroBatch], lr: float) -> StepResult:
    """Forward and backward over this rank's `microbatches` (all of one size), then one update at `lr`."""
    for chunk in state.wrapped:
        chunk.train()
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    loss_sums, tokens, not_finite, *heads = _run(state, microbatches, forward_only=False)
    grad_norm, skipped = update(state.optimizer, state.config.optimizer, lr)
    loss = float("nan") if not_finite.any() else int(loss_sums.sum()) / FIXED_POINT / max(1, int(tokens.sum()))
    mtp_loss = None
    if heads:
        mtp_loss = float("nan") if heads[2].any() else int(heads[0].sum()) / FIXED_POINT / max(1, int(heads[1].sum()))
    return StepResult(loss, grad_norm, loss_sums, tokens, skipped, mtp_loss=mtp_loss)


@torch.no_grad()
def evaluate_step(
    state: TrainState, microbatches: Sequence[MicroBatch]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(loss sums in units of 1/FIXED_POINT, tokens) by source over all ranks' `microbatches`; weights stay."""
    for chunk in state.wrapped:
        chunk.eval()
    loss_sums, tokens, _ = _run(state, microbatches, forward_only=True)
    return loss_sums, tokens


def _run(state: TrainState, microbatches: Sequence[MicroBatch], forward_only: bool) -> npt.NDArray[np.int64]:
    """The rows of a `SourceLoss`, int64[3, sources], summed over all micro-batches and ranks; in training with
    multi-token heads three more, likewise of these."""
    mtp = None if forward_only else state.config.model.mtp
    weight = None if mtp is None else mtp.loss_weight
    reports = run_schedule(state, microbatches, partial(_forward_step, state.num_sources, weight), forward_only)
    rows = 3 if mtp is None else 6
    total = torch.zeros(rows, state.num_sources, dtype=torch.int64, device=accelerator.device())
    for report in reports:  # empty but on the last pipeline stage
        total += report
    process_groups.sum_over_data_parallel(total)
    result: npt.NDArray[np.int64] = process_groups.broadcast_from_last_stage(total).cpu().numpy()
    return result


def run_schedule(
    state: TrainState, microbatches: Sequence[MicroBatch], forward_step: Callable[..., Any], forward_only: bool
) -> list[Any]:
    """What `forward_step` reports of each micro-batch, run as megatron-core's schedule for the layout runs them; empty
    but on the last pipeline stage."""
    inputs = [place(microbatch, state) for microbatch in microbatches]
    iterators = [iter(inputs) for _ in state.wrapped]
    single = len(state.wrapped) == 1
    reports: list[Any] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators[0] if single else iterators,
        model=state.wrapped[0] if single else state.wrapped,
        num_microbatches=len(inputs),
        seq_length=inputs[0].tokens,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return reports


@dataclass(frozen=True)
class Placed:
    """A micro-batch on the device; under context parallelism only this rank's part of it."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    loss_weights: torch.Tensor | None
    position_ids: torch.Tensor
    source_ids: torch.Tensor
    """int64[local tokens]"""
    documents: PackedDocuments
    tokens: int
    """Tokens of the whole micro-batch."""
    ahead: AheadLabels | None
    """What multi-token heads predict; None without them."""


def place(microbatch: MicroBatch, state: TrainState) -> Placed:
    """`microbatch` on this rank's device, with what attention needs of its documents."""
    device, model, tokens = accelerator.device(), state.config.model, microbatch.input_ids.size(1)
    cp, seq_len = state.layout.context_parallel_size, microbatch.seq_len
    held = gathered = None
    if cp > 1:
        parts = [context_parallel_index(tokens, seq_len, cp, rank) for rank in range(cp)]
        held, gathered = parts[state.ranks.cp_rank], torch.cat(parts)

    def local(tensor: torch.Tensor) -> torch.Tensor:
        return (tensor if held is None else tensor[..., held]).to(device, non_blocking=True)

    position_ids = local(microbatch.position_ids)
    ahead = None
    if model.mtp is not None:
        whole = labels_ahead(microbatch, model.mtp.depth)
        weights = None if whole.loss_weights is None else local(whole.loss_weights)
        ahead = AheadLabels(local(whole.labels), local(whole.loss_mask), weights)
    return Placed(
        input_ids=local(microbatch.input_ids),
        labels=local(microbatch.labels),
        loss_mask=local(microbatch.loss_mask),
        loss_weights=None if microbatch.loss_weights is None else local(microbatch.loss_weights),
        position_ids=position_ids,
        source_ids=local(microbatch.token_sources),
        documents=pack_documents(
            microbatch.cu_seqlens,
            position_ids[0],
            seq_len,
            head_size(model),
            state.stage.rope_base,
            DTYPES[state.config.train.precision],
            held,
            gathered,
            microbatch.prefix_lengths,
        ),
        tokens=tokens,
        ahead=ahead,
    )


def _forward_step(num_sources: int, head_weight: float | None, inputs: Iterator[Placed], model: Any) -> tuple[Any, Any]:
    """What megatron's schedules call: a model chunk's output for the next micro-batch, and the loss of that output."""
    batch = next(inputs)
    labels, loss = batch.labels, loss_function
    if head_weight is not None and batch.ahead is not None:
        labels = torch.cat([labels, batch.ahead.labels])
        loss = partial(
            loss_with_heads,
            head_mask=batch.ahead.loss_mask,
            head_weights=batch.ahead.loss_weights,
            head_weight=head_weight,
        )
    output = model(batch.input_ids, batch.position_ids, None, labels=labels, packed_seq_params=batch.documents)
    return output, partial(
        loss,
        loss_mask=batch.loss_mask,
        loss_weights=batch.loss_weights,
        source_ids=batch.source_ids,
        num_sources=num_sources,
    )
