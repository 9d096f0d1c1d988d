"""Context parallelism: ranks see just the tokens that one process sees, and train on the same curve."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from process_group import run_ranks
from tiny_run import assert_same_curve, tiny_config, tiny_steps
from varlen_on_cpu import aligned_to_the_last

from parallel import attention, process_groups
from parallel.attention import PackedAttention, pack_documents
from parallel.context_parallel import context_parallel_index, share_of
from parallel.engine import parallel_state
from parallel.layout import ContextParallelMethod, Layout

METHODS: tuple[ContextParallelMethod, ...] = ("all_gather", "all_to_all")
CPU = torch.device("cpu")


@given(rows=st.integers(1, 4), cp=st.integers(1, 4), piece=st.integers(1, 4))
def test_ranks_share_tokens_and_work_evenly(rows: int, cp: int, piece: int) -> None:
    seq_len = 2 * cp * piece
    parts = [context_parallel_index(rows * seq_len, seq_len, cp, rank) for rank in range(cp)]
    assert sorted(torch.cat(parts).tolist()) == list(range(rows * seq_len))
    work = {int((part % seq_len).sum()) for part in parts}
    assert len(work) == 1


@st.composite
def packed_rows(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """(lengths of documents, seq_len, context-parallel size); no document goes past a row."""
    cp, rows = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    seq_len = 2 * cp * draw(st.integers(1, 5))
    cuts = {draw(st.integers(0, rows * seq_len)) for _ in range(draw(st.integers(0, 8)))}
    ends = sorted(cuts | {(row + 1) * seq_len for row in range(rows)} - {0})
    ends = [end for end in ends if end]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)], seq_len, cp


def visible(query_lengths: list[int], key_lengths: list[int], keys: list[int]) -> Iterator[list[int]]:
    """The keys that each query sees: of a piece's queries the last sees all, the one before one less."""
    for queries, held in zip(query_lengths, key_lengths, strict=True):
        piece, keys = keys[:held], keys[held:]
        for query in range(queries):
            yield piece[: held - (queries - 1 - query)]
    assert not keys


@given(packed_rows())
def test_every_query_sees_its_document_up_to_itself(case: tuple[list[int], int, int]) -> None:
    lengths, seq_len, cp = case
    tokens = sum(lengths)
    first = [start for length, start in zip(lengths, torch.tensor([0, *lengths]).cumsum(0).tolist(), strict=False)
             for _ in range(length)]  # fmt: skip
    order = torch.cat([context_parallel_index(tokens, seq_len, cp, rank) for rank in range(cp)])
    for rank in range(cp):
        own = context_parallel_index(tokens, seq_len, cp, rank).tolist()
        gathered = share_of(lengths, seq_len, cp, rank, "all_gather", CPU)
        seen = list(visible(gathered.query_lengths, gathered.key_lengths, order[gathered.rows].tolist()))
        assert seen == [list(range(first[query], query + 1)) for query in own]
        swapped = share_of(lengths, seq_len, cp, rank, "all_to_all", CPU)
        assert order[swapped.rows].tolist() == list(range(tokens))
        assert swapped.back is not None
        assert torch.equal(torch.arange(tokens)[swapped.back], order)


@pytest.mark.multiprocess
@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2)])
@pytest.mark.parametrize("method", METHODS)
def test_outputs_and_gradients_are_those_of_one_process(
    method: ContextParallelMethod, heads: int, groups: int, varlen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seq_len, size, lengths = 16, 8, [3, 1, 12, 5, 5, 6]  # two rows, documents cut by every boundary of pieces
    tokens = sum(lengths)
    positions = torch.cat([torch.arange(length) for length in lengths])
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    random = torch.Generator().manual_seed(1)
    whole = [torch.randn(tokens, number, size, generator=random) for number in (heads, groups, groups)]
    upstream = torch.randn(tokens, heads * size, generator=random)

    def attend(layout: Layout) -> list[torch.Tensor]:
        """The output and the three gradients, of this rank's tokens."""
        rank = process_groups.initialize(layout, seed=1, timeout_s=60).cp_rank
        held = context_parallel_index(tokens, seq_len, layout.context_parallel_size, rank)
        cp = layout.context_parallel_size
        share = share_of(lengths, seq_len, cp, rank, method, CPU) if cp > 1 else None
        documents = pack_documents(cu_seqlens, positions[held], seq_len, size, 100.0, torch.float32, share)
        groups: Any = type("Groups", (), {"cp": parallel_state.get_context_parallel_group()})
        own = [x[held].requires_grad_() for x in whole]
        out = PackedAttention(config=None, pg_collection=groups)(*own, None, packed_seq_params=documents)
        out.backward(upstream[held])
        result = [out.detach(), *(x.grad for x in own)]
        if layout.world_size == 1:
            process_groups.shutdown()
        return result

    expected = attend(Layout(1))
    if varlen:
        monkeypatch.setattr(attention, "varlen_kernel", lambda dtype: aligned_to_the_last)
    ranks = run_ranks(2, attend, Layout(2, context_parallel_size=2, context_parallel_method=method))
    order = torch.cat([context_parallel_index(tokens, seq_len, 2, rank) for rank in range(2)])
    for parts, one in zip(zip(*ranks, strict=True), expected, strict=True):
        torch.testing.assert_close(torch.cat(parts), one[order], rtol=1e-5, atol=1e-6)


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "sizes",
    [{"world_size": 2}, {"world_size": 4}, {"world_size": 4, "tensor_parallel_size": 2, "sequence_parallel": True}],
    ids=["cp2", "dp2 cp2", "tp2+sp cp2"],
)
@pytest.mark.parametrize("method", METHODS)
def test_training_has_the_single_process_curve(method: ContextParallelMethod, sizes: dict[str, Any]) -> None:
    # Two sequences in a micro-batch, documents of uneven length, half as many key/value heads.
    config = tiny_config("qwen3", micro_batch_size=2, num_attention_heads=8, num_query_groups=4)
    layout = Layout(context_parallel_size=2, context_parallel_method=method, **sizes)
    results = run_ranks(layout.world_size, tiny_steps, config, layout, 3, timeout_s=120)
    assert_same_curve(results[0], tiny_steps(config, Layout(1), 3))
