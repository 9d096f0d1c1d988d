"""No document hears of another, in any layout: one document's tokens change, and every other document's logits and
gradients stay the same bits.

With experts they stay the same to rounding: an expert takes its tokens of all documents in one matrix product, whose
order of additions depends on their number. Its balancing loss, which is of all tokens by design, is left out.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from layout_matrix import LAYOUTS, VARIANTS, Entry, matrix_state
from process_group import run_ranks
from tiny_run import BATCH, SEQ_LEN, VOCAB

from parallel import process_groups
from parallel.context_parallel import context_parallel_index
from pretrain.loss import loss_function
from pretrain.microbatch import MicroBatch, split_batch
from pretrain.step import Placed, TrainState, run_schedule

MODELS = (
    next(v for v in VARIANTS if v["family"] == "llama" and v["num_query_groups"] < 8),
    next(v for v in VARIANTS if v["family"] == "wonton" and v["qk_norm"]),
)
STARTS = np.array([0, 5, 6, 19], dtype=np.int32)
"""Of the four documents of every sequence; the second is a single token, the third crosses context-parallel pieces."""


def batch(changed: tuple[int, int] | None, ranks: Any) -> list[MicroBatch]:
    """This rank's micro-batches of one sequence; `changed` (sequence, document) has other tokens than usual."""
    tokens = np.random.default_rng(7).integers(0, VOCAB, (BATCH, SEQ_LEN + 1))
    if changed is not None:
        sequence, document = changed
        bounds = [*STARTS.tolist(), SEQ_LEN + 1]
        part = slice(bounds[document], bounds[document + 1])
        tokens[sequence, part] = (tokens[sequence, part] + 1 + document) % VOCAB
    mine = slice(ranks.dp_rank, None, ranks.dp_size)
    return split_batch(tokens[mine], [STARTS] * len(tokens[mine]), np.zeros(len(tokens[mine]), np.int64), 1)


def observe(state: TrainState, microbatches: list[MicroBatch]) -> list[dict[str, torch.Tensor]]:
    """Per micro-batch what this rank sees of it: `logits` [local tokens, vocab / tp] where the head is, `gradients`
    [local tokens, hidden] of the embedded tokens where the embedding is."""
    seen: list[dict[str, torch.Tensor]] = [{} for _ in microbatches]
    logits: list[torch.Tensor] = []
    gradients: list[torch.Tensor] = []
    handles = []
    for chunk in state.chunks:
        if chunk.post_process:
            handles.append(chunk.output_layer.register_forward_hook(lambda _, __, out: logits.append(out[0].detach())))
        if chunk.pre_process:
            handles.append(chunk.embedding.register_full_backward_hook(lambda _, __, out: gradients.append(out[0])))

    def forward_step(inputs: Iterator[Placed], model: Any) -> tuple[Any, Any]:
        placed = next(inputs)
        out = model(
            placed.input_ids, placed.position_ids, None, labels=placed.labels, packed_seq_params=placed.documents
        )
        return out, partial(
            loss_function,
            loss_mask=placed.loss_mask,
            loss_weights=None,
            source_ids=placed.source_ids,
            num_sources=1,
        )

    for chunk in state.wrapped:
        chunk.train()
        chunk.zero_grad_buffer()
    run_schedule(state, microbatches, forward_step, forward_only=False)
    for handle in handles:
        handle.remove()
    for kind, found in (("logits", logits), ("gradients", gradients)):
        for number, tensor in enumerate(found):
            seen[number][kind] = tensor.reshape(-1, tensor.size(-1)).clone()
    return seen


def rows_of(kind: str, state: TrainState) -> torch.Tensor:
    """int64: which tokens of a sequence the rows of an observation are."""
    layout, ranks = state.layout, state.ranks
    rows = torch.arange(SEQ_LEN)
    if layout.context_parallel_size > 1:
        rows = context_parallel_index(SEQ_LEN, SEQ_LEN, layout.context_parallel_size, ranks.cp_rank)
    if kind == "gradients" and layout.sequence_parallel:
        rows = rows.chunk(layout.tensor_parallel_size)[ranks.tp_rank]
    return rows


def leaks(entry: Entry, model: dict[str, Any]) -> tuple[int, int]:
    """(values of other documents that changed, values of the changed document that changed)"""
    ranks = process_groups.initialize(entry.layout, seed=1, timeout_s=120)
    document_of = torch.from_numpy(np.searchsorted(STARTS, np.arange(SEQ_LEN), side="right") - 1)
    own_keys = {**entry.model, "moe_aux_loss": 0.0} if entry.model else {}
    state = matrix_state({**model, **own_keys}, entry.layout, ranks)
    usual = observe(state, batch(None, ranks))
    others = own = 0
    for changed in ((0, 2), (3, 0)):
        now = observe(state, batch(changed, ranks))
        for number, (before, after) in enumerate(zip(usual, now, strict=True)):
            sequence = number * ranks.dp_size + ranks.dp_rank
            for kind, values in before.items():
                tolerance = 1e-5 * float(values.abs().max()) if entry.model else 0.0
                differs = ((values - after[kind]).abs() > tolerance).any(dim=1)
                is_own = document_of[rows_of(kind, state)] == changed[1]
                is_own &= sequence == changed[0]
                others += int((differs & ~is_own).sum())
                own += int((differs & is_own).sum())
    if entry.layout.world_size == 1:
        process_groups.shutdown()
    return others, own


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", LAYOUTS)
def test_no_document_hears_of_another(name: str) -> None:
    """Layouts take the two models in turn."""
    entry, model = LAYOUTS[name], MODELS[list(LAYOUTS).index(name) % len(MODELS)]
    found = run_ranks(entry.layout.world_size, leaks, entry, model, timeout_s=300)
    assert sum(others for others, _ in found) == 0, "another document's logits or gradients changed"
    assert sum(own for _, own in found) > 0, "the changed document's did not change: nothing was looked at"
