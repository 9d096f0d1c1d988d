"""Prefix LM in training: loss masks by hand, leaks between documents, layouts, and packing again."""

import numpy as np
import pytest
import torch
from process_group import run_ranks
from tiny_run import SEQ_LEN, VOCAB, tiny_config, tiny_state

from headrace.errors import ConfigError
from parallel import process_groups
from parallel.layout import Layout
from pretrain.config import validate_config
from pretrain.microbatch import MicroBatch, split_batch
from pretrain.selection.repack import repack
from pretrain.step import StepResult, place, train_step

LAYOUTS = {
    "dp2": Layout(2, distributed_optimizer=True),
    "tp2+sp": Layout(2, tensor_parallel_size=2, sequence_parallel=True),
    "pp2": Layout(2, pipeline_parallel_size=2),
}


def batch(step: int, dp_rank: int = 0, dp_size: int = 1) -> list[MicroBatch]:
    random = np.random.default_rng(step)
    tokens = random.integers(0, VOCAB, (4, SEQ_LEN + 1))
    starts = [np.array([0, 7, 20], np.int32), np.array([0], np.int32), np.array([0, 30], np.int32), np.array([0, 32])]
    prefixes = [np.array([3, 0, 5]), np.array([12]), None, np.array([31, 0])]
    mine = slice(dp_rank, None, dp_size)
    return split_batch(tokens[mine], starts[mine], np.array([0, 1, 0, 1])[mine], 1, None, prefixes[mine])


def test_labels_inside_a_prefix_carry_no_loss() -> None:
    tokens = np.arange(9)[None]
    (made,) = split_batch(
        tokens, [np.array([0, 5, 8], np.int32)], np.array([0]), 1, None, [np.array([3, 2, 0], np.int64)]
    )
    # inputs     0 1 2 3 4 | 5 6 7      labels  1 2 3 4 5 | 6 7 8     prefixes 0 1 2 and 5 6
    # 5 and 8 are other documents' first tokens; 1, 2 and 6 are in prefixes.
    assert made.loss_mask[0].tolist() == [False, False, True, True, False, False, True, False]
    assert made.prefix_lengths is not None
    assert made.prefix_lengths.tolist() == [3, 2]
    assert made.cu_seqlens.tolist() == [0, 5, 8]


def test_a_changed_prefix_token_changes_no_other_documents_logits() -> None:
    state = tiny_state(tiny_config("llama"), Layout(1))
    state.chunks[0].eval()

    def logits(microbatch: MicroBatch) -> torch.Tensor:
        placed = place(microbatch, state)
        with torch.no_grad():
            out: torch.Tensor = state.chunks[0](
                placed.input_ids, placed.position_ids, None, packed_seq_params=placed.documents
            )
        return out[0]

    first = batch(0)[0]
    before = logits(first)
    first.input_ids[0, 22] = (first.input_ids[0, 22] + 1) % VOCAB  # the third token of the last document's prefix
    after = logits(first)
    assert torch.equal(after[:20], before[:20])
    assert (after[20:] != before[20:]).any(dim=1).all(), "all of its own document, earlier tokens too"
    process_groups.shutdown()


def steps(layout: Layout) -> list[StepResult]:
    config = tiny_config("llama", micro_batch_size=1)
    state = tiny_state(config, layout)
    ranks = state.ranks
    results = [train_step(state, batch(step, ranks.dp_rank, ranks.dp_size), 1e-3) for step in range(3)]
    if layout.world_size == 1:
        process_groups.shutdown()
    return results


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_has_the_single_process_curve(name: str) -> None:
    for result, reference in zip(run_ranks(2, steps, LAYOUTS[name], timeout_s=120)[0], steps(Layout(1)), strict=True):
        assert result.loss == pytest.approx(reference.loss, rel=1e-5)
        assert result.grad_norm == pytest.approx(reference.grad_norm, rel=1e-5)
        assert result.source_tokens.tolist() == reference.source_tokens.tolist()


def test_packing_again_keeps_prefixes_with_their_documents() -> None:
    microbatches = batch(0)
    chosen = np.stack([each.loss_mask[0].numpy() for each in microbatches])
    chosen[1] = False
    again = repack(microbatches, chosen)
    found = {}
    for made in again:
        assert made.prefix_lengths is not None
        for begin, end, prefix in zip(made.cu_seqlens[:-1], made.cu_seqlens[1:], made.prefix_lengths, strict=True):
            if made.loss_mask[0, begin:end].any():
                found[tuple(made.input_ids[0, begin:end].tolist())] = int(prefix)
    for number in (0, 2, 3):
        of = microbatches[number]
        own = torch.zeros(len(of.cu_seqlens) - 1) if of.prefix_lengths is None else of.prefix_lengths
        for begin, end, prefix in zip(of.cu_seqlens[:-1], of.cu_seqlens[1:], own, strict=True):
            if of.loss_mask[0, begin:end].any():
                assert found[tuple(of.input_ids[0, begin:end].tolist())] == int(prefix)


def test_context_parallelism_is_refused_in_one_line() -> None:
    raw = tiny_config("llama").model_dump(mode="json")
    raw["data"]["objectives"] = [{"kind": "prefix_lm"}]
    validate_config(raw, "run.yaml")
    raw["parallel"]["context_parallel_size"] = 2
    with pytest.raises(ConfigError, match="both directions, which needs parallel") as told:
        validate_config(raw, "run.yaml")
    assert "\n" not in str(told.value)
    raw["data"]["objectives"][0]["bidirectional"] = False
    validate_config(raw, "run.yaml")
