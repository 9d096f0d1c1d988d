"""Packing what was chosen: every kept document once and whole, and the same gradient as without packing."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_run import tiny_batch, tiny_config, tiny_state

from parallel import process_groups
from parallel.layout import Layout
from pretrain.microbatch import MicroBatch
from pretrain.selection.repack import empty, lay_out, masked, repack
from pretrain.step import train_step

Document = tuple[tuple[int, ...], ...]


def documents(microbatches: list[MicroBatch], chosen: np.ndarray | None = None) -> list[Document]:  # type: ignore[type-arg]
    """Every document with a token that is minimised: (ids, labels, minimised, sources, weights, positions)."""
    found = []
    for number, each in enumerate(microbatches):
        mask = each.loss_mask[0].numpy() if chosen is None else each.loss_mask[0].numpy() & chosen[number]
        edges = each.cu_seqlens.tolist()
        for begin, end in itertools.pairwise(edges):
            if mask[begin:end].any():
                weights = None if each.loss_weights is None else each.loss_weights[0, begin:end]
                found.append(
                    (
                        *(tuple(x[0, begin:end].tolist()) for x in (each.input_ids, each.labels, each.position_ids)),
                        tuple(mask[begin:end].tolist()),
                        tuple(each.token_sources[begin:end].tolist()),
                        tuple([1.0] * (end - begin) if weights is None else weights.tolist()),
                    )
                )
    return sorted(found)


@settings(max_examples=40)
@given(st.integers(0, 50), st.floats(0, 1), st.booleans(), st.sampled_from([1, 2, 4]))
def test_every_kept_document_is_there_once_and_whole(seed: int, share: float, weighted: bool, size: int) -> None:
    batch = tiny_batch(seed, micro_batch_size=size, weighted=weighted)
    tokens = batch[0].input_ids.size(1)
    chosen = np.random.default_rng(seed).random((len(batch), tokens)) < share / 4
    again = repack(batch, chosen)
    assert documents(again) == documents(batch, chosen)
    for each in again:
        assert each.input_ids.shape == (1, tokens)
        assert each.seq_len == batch[0].seq_len
        assert each.cu_seqlens[0] == 0
        assert each.cu_seqlens[-1] == tokens
        lengths = np.diff(each.cu_seqlens.numpy())
        assert (lengths > 0).all()
        assert lengths.max() == each.max_seqlen <= each.seq_len, "positions stay where rotary tables reach"
    assert len(repack(batch, np.zeros_like(chosen))) == 0


def test_an_empty_micro_batch_has_the_same_shapes_and_no_loss() -> None:
    like = tiny_batch(0)[0]
    made = empty(like)
    assert made.input_ids.shape == like.input_ids.shape
    assert not made.loss_mask.any()
    assert made.token_sources.shape == like.token_sources.shape
    assert int(made.cu_seqlens[-1]) == like.input_ids.size(1)


@given(st.lists(st.integers(1, 16), max_size=40))
def test_rows_are_not_overfull_and_few(lengths: list[int]) -> None:
    rows = lay_out(np.array(lengths, np.int64), 16)
    assert sorted(document for row in rows for document in row) == list(range(len(lengths)))
    filled = [sum(lengths[document] for document in row) for row in rows]
    assert all(0 < each <= 16 for each in filled)
    # Best-fit decreasing needs at most 11/9 of the fewest, and 4 (Johnson 1973).
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // 16) * 2 + 4


@pytest.mark.parametrize("weighted", [False, True])
def test_the_gradient_is_that_of_masking(weighted: bool) -> None:
    batch = tiny_batch(0, weighted=weighted)
    random = np.random.default_rng(1)
    chosen = np.stack(
        [np.repeat(random.random(len(each.cu_seqlens) - 1) < 0.4, np.diff(each.cu_seqlens)) for each in batch]
    )
    packed = repack(batch, chosen)
    assert len(packed) < len(batch)
    norms, tokens = [], []
    for microbatches in (masked(batch, chosen), packed, [*packed, empty(batch[0])]):
        state = tiny_state(tiny_config("llama"), Layout(1))
        result = train_step(state, microbatches, 1e-3)
        norms.append(result.grad_norm)
        tokens.append(result.source_tokens.tolist())
        process_groups.shutdown()
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-5)
    assert tokens[0] == tokens[1] == tokens[2]
