"""A training step on a part of its batch."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from data_scheduler.encoder import Encoder
from headrace.errors import ConfigError
from parallel import accelerator, exchange, process_groups
from parallel.layout import Layout
from parallel.process_groups import Ranks
from pretrain.config import RunConfig
from pretrain.loss import FIXED_POINT, source_report
from pretrain.microbatch import MicroBatch
from pretrain.optimizer import loss_scale
from pretrain.selection import BoolArray, Float64, Int64, Scored, TokenSelector, make_selector
from pretrain.selection.reference import load_reference
from pretrain.selection.repack import empty, masked, repack
from pretrain.selection.score import token_losses
from pretrain.selection.top import top
from pretrain.step import Selected, StepResult, TrainState, train_step


def open_selection(config: RunConfig, layout: Layout, ranks: Ranks, encoder: Encoder) -> "Selection | None":
    """What `train.selection` asks for; None when everything is trained on. Raises HeadraceError."""
    asked = config.train.selection
    if asked is None:
        return None
    selector = make_selector(asked.kind, asked.options)
    if selector.needs_reference and asked.reference is None:
        raise ConfigError(f"train.selection.reference is required by {asked.kind}: give a run folder or a checkpoint")
    if asked.reference is not None and not selector.needs_reference:
        raise ConfigError(f"train.selection.reference: {asked.kind} uses no reference model; leave the key out")
    reference = load_reference(config, layout, ranks, encoder) if selector.needs_reference else None
    return Selection(selector, asked.from_step, reference)


class Selection:
    """Scores, chooses, packs again, trains."""

    def __init__(self, selector: TokenSelector, from_step: int, reference: TrainState | None) -> None:
        """`reference`: a model with the layout of the one that is trained; its weights stay."""
        self.selector, self.from_step, self.reference = selector, from_step, reference

    def step(self, state: TrainState, microbatches: Sequence[MicroBatch], lr: float, step: int) -> StepResult:
        """As `train_step`, on what is chosen; the losses reported are those of the whole batch."""
        if step < self.from_step:
            return train_step(state, microbatches, lr)
        losses = token_losses(state, microbatches)
        mask = torch.cat([each.loss_mask for each in microbatches]).numpy()
        sources = torch.stack([each.token_sources for each in microbatches]).numpy()
        chosen = self._chosen(losses, mask, sources, microbatches, step)
        sums, tokens, not_finite = _by_source(losses, mask, sources, state.num_sources)
        documents, kept_documents = _documents(microbatches, mask, chosen, sources, state.num_sources)
        loss = float("nan") if not_finite.any() else int(sums.sum()) / FIXED_POINT / max(1, int(tokens.sum()))
        again = repack(microbatches, chosen)
        (most,) = exchange.largest([float(len(again))])
        if not most:  # nothing to learn in the whole batch: no update, which would still decay weights and moments
            selected = Selected(np.zeros_like(tokens), documents, kept_documents)
            return StepResult(loss, 0.0, sums, tokens, False, selected, loss_scale(state.optimizer))
        number = int(most)
        if state.layout.virtual_pipeline_parallel_size:  # megatron's interleaved schedule takes groups of them
            number += -number % state.layout.pipeline_parallel_size
        if number >= len(microbatches):
            again = masked(microbatches, chosen)
        else:
            again += [empty(microbatches[0])] * (number - len(again))
        trained = train_step(state, again, lr)
        selected = Selected(trained.source_tokens, documents, kept_documents)
        return replace(trained, loss=loss, source_loss_sums=sums, source_tokens=tokens, selected=selected)

    def _chosen(
        self, losses: Float64, mask: BoolArray, sources: Int64, microbatches: Sequence[MicroBatch], step: int
    ) -> BoolArray:
        """bool[micro-batches, tokens]: the tokens whose loss is minimised."""
        lengths = [np.diff(each.cu_seqlens.numpy()) for each in microbatches]
        documents = np.repeat(np.arange(sum(map(len, lengths))), np.concatenate(lengths)).reshape(mask.shape)
        reference = None
        if self.reference is not None:
            reference = token_losses(self.reference, microbatches)[mask]
        scored = Scored(step, losses[mask], reference, documents[mask], sources[mask])
        chosen = np.zeros_like(mask)
        # A loss that is not a number is trained on, so that the guard of the gradient hears of it.
        chosen[mask] = self.selector.select(scored, top) | ~np.isfinite(scored.losses)
        return chosen


def selection_record(selected: Selected, names: Sequence[str]) -> dict[str, dict[str, int]]:
    """What a training record says of a selection, by source; sources that the batch had nothing of are left out."""
    columns = {
        "trained_tokens": selected.tokens,
        "batch_documents": selected.documents,
        "trained_documents": selected.kept_documents,
    }
    there = [number for number in range(len(names)) if selected.documents[number]]
    return {key: {names[number]: int(values[number]) for number in there} for key, values in columns.items()}


def _by_source(losses: Float64, mask: BoolArray, sources: Int64, number: int) -> Int64:
    """int64[3, sources], the rows of a `SourceLoss`, over all ranks."""
    report = source_report(*(torch.from_numpy(each.reshape(-1)) for each in (losses, mask, sources)), number)
    return _summed(report)


def _documents(
    microbatches: Sequence[MicroBatch], mask: BoolArray, chosen: BoolArray, sources: Int64, number: int
) -> Int64:
    """int64[2, sources]: pieces of documents that carry loss, and those of them with a chosen token, over all ranks."""
    tokens = mask.shape[1]
    begins = np.concatenate([at * tokens + each.cu_seqlens.numpy()[:-1] for at, each in enumerate(microbatches)])
    of = sources.reshape(-1)[begins]
    counts = [
        np.bincount(of[np.logical_or.reduceat(each.reshape(-1), begins)], minlength=number) for each in (mask, chosen)
    ]
    return _summed(torch.from_numpy(np.array(counts, np.int64)))


def _summed(report: torch.Tensor) -> Int64:
    summed: Int64 = process_groups.sum_over_replicas(report.to(accelerator.device())).cpu().numpy()
    return summed
