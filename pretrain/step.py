"""One training step, on one screen: micro-batches in, updated weights and exact per-source losses out."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from data_scheduler.stages import longest_sequence
from parallel import accelerator, process_groups
from parallel.attention import PackedDocuments, pack_documents
from parallel.context_parallel import context_parallel_index, share_of
from parallel.engine import get_forward_backward_func
from parallel.layout import Layout
from parallel.process_groups import Ranks
from parallel.spec import forget_tokens
from pretrain.config import RunConfig
from pretrain.dynamics import Dynamics, Measurement, NoiseScale
from pretrain.loss import FIXED_POINT, LossInputs, loss_function, loss_with_heads, summed_by_the_model
from pretrain.microbatch import MicroBatch
from pretrain.models.fused import check_same_everywhere
from pretrain.models.gpt import DTYPES, LanguageModel, build_model
from pretrain.models.multi_token import AheadLabels, labels_ahead
from pretrain.models.sizes import head_size
from pretrain.optimizer import build_optimizer, loss_scale, update
from pretrain.recovery.fault_points import reach
from pretrain.recovery.loss_guard import LossGuard
from pretrain.rope import rope_scaling
from pretrain.stages import StageSettings, first_settings
from pretrain.trainable import check_trainable, frozen


@dataclass
class TrainState:
    """Everything a step reads and changes."""

    chunks: list[LanguageModel]
    """The model chunks themselves."""
    wrapped: list[Any]
    """The same chunks, wrapped for data parallelism; steps run these."""
    optimizer: Any
    config: RunConfig
    layout: Layout
    ranks: Ranks
    num_sources: int
    stage: StageSettings
    """What holds for the step at hand; between two steps, for the one before."""
    measured: bool = False
    """The step at hand is measured (`metrics.dynamics`)."""
    noise_scale: NoiseScale = field(default_factory=NoiseScale)
    """Moving averages over measured steps."""
    guard: LossGuard | None = None
    """Judges the step at hand before its update; None: nobody does."""
    beat: Callable[[str], None] | None = None
    """Hears of every micro-batch of an evaluation, which may take longer than any step."""

    @property
    def stored(self) -> list[Any]:
        """What weights are saved from and loaded into: the chunks, or what holds the shards of them."""
        return self.wrapped if self.layout.fully_sharded else self.chunks


@dataclass(frozen=True)
class StepResult:
    """What a step did; the same on every rank but for the seconds it took."""

    loss: float
    """Mean reported loss of the global batch's tokens, natural log; NaN when any token's loss was not finite."""
    grad_norm: float
    """Norm of the whole gradient before clipping."""
    source_loss_sums: npt.NDArray[np.int64]
    """int64[sources]: summed loss of each source's tokens in units of 1/FIXED_POINT."""
    source_tokens: npt.NDArray[np.int64]
    """int64[sources]: tokens whose loss counted."""
    skipped: bool
    """The gradient was not finite, or the loss guard refused, so the weights were left alone."""
    selected: "Selected | None" = None
    """What was trained on, where `train.selection` chose among the batch."""
    loss_scale: float = 1.0
    """Factor of the loss in the step's backward pass; other than 1 with fp16 only."""
    dynamics: Dynamics | None = None
    """What was measured inside the model, in a step that is measured."""
    mtp_loss: float | None = None
    """Mean loss of the multi-token heads, over all they had to predict; None without them."""
    passes_s: float = field(default=0.0, compare=False)
    """Seconds this rank took for the forward and backward passes, the sums of gradients over replicas included."""
    update_s: float = field(default=0.0, compare=False)
    """Seconds this rank took for clipping and the update; of work that it leaves to a GPU, none."""


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
    check_same_everywhere(config.kernels)
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
    check_trainable(config, chunks)
    optimizer, wrapped = build_optimizer(config, chunks, layout)
    sources = len(config.data.sources) if num_sources is None else num_sources
    return TrainState(chunks, wrapped, optimizer, config, layout, ranks, sources, first_settings(config))


def train_step(state: TrainState, microbatches: Sequence[MicroBatch], lr: float) -> StepResult:
    """Forward and backward over this rank's `microbatches` (all of one size), then one update at `lr`."""
    began = time.perf_counter()
    for chunk in state.wrapped:
        chunk.train()
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    scale = loss_scale(state.optimizer)  # that of this step; the update adapts it for the next
    measurement = None
    if state.measured:
        measurement = Measurement(
            state.chunks,
            state.stored,
            state.optimizer,
            state.layout,
            state.ranks,
            microbatches,
            scale,
            state.stage.trainable,
        )
    with measurement or nullcontext():
        report = _run(state, microbatches, forward_only=False, measurement=measurement)
        passed = time.perf_counter()
        reach("step: before the update")
        still = frozen(state.stored, state.optimizer, state.stage.trainable)
        loss = mean_loss(report[:3])
        allows = None if state.guard is None else partial(state.guard.allows, loss)
        grad_norm, skipped = update(state.optimizer, state.config.optimizer, lr, still, measurement, allows)
    loss_sums, tokens, _, *heads = report
    return StepResult(
        loss,
        grad_norm,
        loss_sums,
        tokens,
        skipped,
        loss_scale=scale,
        dynamics=measurement.values(state.noise_scale) if measurement else None,
        mtp_loss=mean_loss(report[3:]) if heads else None,
        passes_s=passed - began,
        update_s=time.perf_counter() - passed,
    )


def mean_loss(report: npt.NDArray[np.int64]) -> float:
    """The mean of all tokens that a report (the rows of a `SourceLoss`) counts; NaN when any was not finite."""
    loss_sums, tokens, not_finite = report
    return float("nan") if not_finite.any() else int(loss_sums.sum()) / FIXED_POINT / max(1, int(tokens.sum()))


@torch.no_grad()
def evaluate_step(
    state: TrainState, microbatches: Sequence[MicroBatch]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(loss sums in units of 1/FIXED_POINT, tokens) by source over all ranks' `microbatches`; weights stay."""
    for chunk in state.wrapped:
        chunk.eval()
    loss_sums, tokens, _ = _run(state, microbatches, forward_only=True)
    return loss_sums, tokens


def _run(
    state: TrainState, microbatches: Sequence[MicroBatch], forward_only: bool, measurement: Measurement | None = None
) -> npt.NDArray[np.int64]:
    """The rows of a `SourceLoss`, int64[3, sources], summed over all micro-batches and ranks; in training with
    multi-token heads three more, likewise of these."""
    mtp = None if forward_only else state.config.model.mtp
    weight = None if mtp is None else mtp.loss_weight
    summed = any(chunk.fused_head for chunk in state.chunks)
    forward_step: Callable[..., Any] = partial(_forward_step, state.num_sources, weight, summed)
    if measurement is not None:
        forward_step = measurement.during(forward_step)
    if forward_only and state.beat is not None:
        forward_step = partial(_beating_step, state.beat, forward_step)
    reports = run_schedule(state, microbatches, forward_step, forward_only)
    rows = 3 if mtp is None else 6
    total = torch.zeros(rows, state.num_sources, dtype=torch.int64, device=accelerator.device())
    for report in reports:  # empty but on the last pipeline stage
        total += report
    process_groups.sum_over_data_parallel(total)
    result: npt.NDArray[np.int64] = process_groups.broadcast_from_last_stage(total).cpu().numpy()
    return result


def _beating_step(
    beat: Callable[[str], None], forward_step: Callable[..., Any], inputs: Iterator["Placed"], model: Any
) -> Any:
    beat("a micro-batch of an evaluation")
    return forward_step(inputs, model)


def run_schedule(
    state: TrainState, microbatches: Sequence[MicroBatch], forward_step: Callable[..., Any], forward_only: bool
) -> list[Any]:
    """What `forward_step` reports of each micro-batch, run as megatron-core's schedule for the layout runs them; empty
    but on the last pipeline stage."""
    inputs = [place(microbatch, state) for microbatch in microbatches]
    iterators = [iter(inputs) for _ in state.wrapped]
    # The chunks share one config; a stage of the run may change the number of micro-batches.
    state.chunks[0].config.microbatch_group_size_per_vp_stage = chunk_group(state.layout, len(inputs), forward_only)
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
    for chunk in state.chunks:
        for dispatcher in chunk.dispatchers:
            forget_tokens(dispatcher)
    return reports


def chunk_group(layout: Layout, microbatches: int, forward_only: bool) -> int:
    """How many micro-batches a pipeline rank puts through one of its model chunks before it turns to the next chunk.

    All of them is breadth-first (arXiv 2211.05953): each chunk's turn comes once in the forward and once in the
    backward pass. The first rank then holds as many activations that wait for their turn, for which a forward pass
    alone has no use.
    """
    pp = layout.pipeline_parallel_size
    all_at_once = microbatches % pp if forward_only else layout.pipeline_schedule == "breadth_first"
    return microbatches if all_at_once else pp


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
    layout, cp_rank, seq_len = state.layout, state.ranks.cp_rank, microbatch.seq_len
    cp, held, share = layout.context_parallel_size, None, None
    if cp > 1:
        held = context_parallel_index(tokens, seq_len, cp, cp_rank)
        lengths = torch.diff(microbatch.cu_seqlens).tolist()
        share = share_of(lengths, seq_len, cp, cp_rank, layout.context_parallel_method, device)

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
            share,
            rope_scaling(state.stage.rope_scaling),
            microbatch.prefix_lengths,
        ),
        tokens=tokens,
        ahead=ahead,
    )


def _forward_step(
    num_sources: int, head_weight: float | None, summed: bool, inputs: Iterator[Placed], model: Any
) -> tuple[Any, Any]:
    """What megatron's schedules call: a model chunk's output for the next micro-batch, and the loss of that output.

    `summed`: the model's last chunk has a fused head, which gives sums instead of tokens' losses.
    """
    batch = next(inputs)
    if summed:
        return _summed_forward_step(num_sources, head_weight, batch, model)
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


def _summed_forward_step(num_sources: int, head_weight: float | None, batch: Placed, model: Any) -> tuple[Any, Any]:
    labels, mask, ahead_weights = batch.labels, batch.loss_mask, None
    if head_weight is not None and batch.ahead is not None:
        labels, mask = torch.cat([labels, batch.ahead.labels]), torch.cat([mask, batch.ahead.loss_mask])
        ahead_weights = batch.ahead.loss_weights
    weights = (batch.loss_weights, ahead_weights)
    summed_with = LossInputs(mask, weights, batch.source_ids, num_sources, head_weight or 0.0)
    output = model(
        batch.input_ids,
        batch.position_ids,
        None,
        labels=labels,
        packed_seq_params=batch.documents,
        loss_mask=summed_with,
    )
    return output, partial(summed_by_the_model, loss_mask=batch.loss_mask)
