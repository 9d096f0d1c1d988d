"""Prefix attention agrees with a plain masked softmax, forward and backward, and leaks nothing."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from varlen_on_cpu import aligned_to_the_last

from headrace.errors import LayoutError
from parallel import prefix_attention
from parallel.attention import PackedAttention, PackedDocuments, pack_documents
from parallel.context_parallel import context_parallel_index, share_of
from parallel.rotary import rotate
from parallel.varlen import Spans

HEADS, GROUPS, SIZE = 4, 2, 8


def packed(lengths: list[int], prefixes: list[int]) -> PackedDocuments:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])
    own = torch.tensor(prefixes, dtype=torch.int32)
    return pack_documents(cu_seqlens, positions, max(lengths), SIZE, 100.0, torch.float32, prefix_lengths=own)


def attend(tensors: list[torch.Tensor], documents: PackedDocuments) -> torch.Tensor:
    one = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    attention = PackedAttention(config=None, pg_collection=SimpleNamespace(cp=one))
    out: torch.Tensor = attention(*tensors, None, packed_seq_params=documents)
    return out


def inputs(tokens: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [
        torch.randn(tokens, heads, SIZE, generator=generator, requires_grad=True) for heads in (HEADS, GROUPS, GROUPS)
    ]


def plain(tensors: list[torch.Tensor], documents: PackedDocuments, prefixes: list[int]) -> torch.Tensor:
    """One softmax over all tokens, with a mask written down token by token."""
    assert documents.cos is not None
    assert documents.sin is not None
    query, key = (rotate(x, documents.cos, documents.sin) for x in tensors[:2])
    tokens = query.size(0)
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    begin = 0
    for length, prefix in zip(documents.query_lengths, prefixes, strict=True):
        for q in range(length):
            for k in range(length):
                seen[begin + q, begin + k] = k <= q or (q < prefix and k < prefix)
        begin += length
    key, value = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (key, tensors[2]))
    scores = torch.einsum("qhd,khd->hqk", query, key) / SIZE**0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value).reshape(tokens, -1)


@settings(deadline=None, max_examples=25)
@given(
    shapes=st.lists(
        st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), min_size=1, max_size=5
    )
)
def test_forward_and_backward_agree_with_a_mask(shapes: list[tuple[int, int]]) -> None:
    lengths, prefixes = [length for length, _ in shapes], [prefix for _, prefix in shapes]
    documents = packed(lengths, prefixes)
    ours, theirs = inputs(sum(lengths)), inputs(sum(lengths))
    out, expected = attend(ours, documents), plain(theirs, documents, prefixes)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    slope = torch.linspace(-1, 1, out.numel()).view_as(out)
    (out * slope).sum().backward()
    (expected * slope).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_two_varlen_calls_are_the_same() -> None:
    """The plan for a GPU's kernel, with a kernel written here."""
    for lengths, prefixes in (([5, 1, 9, 3], [2, 0, 9, 1]), ([4, 4], [4, 4])):
        documents = packed(lengths, prefixes)
        found = documents.prefixes
        assert found is not None
        tensors = inputs(sum(lengths))
        spans = Spans(documents.cu_seqlens_kv, documents.max_seqlen_kv)
        by_document = prefix_attention.by_document(*tensors, lengths, found, None)
        in_two_calls = prefix_attention.in_two_calls(*tensors, spans, found, aligned_to_the_last, None)
        torch.testing.assert_close(in_two_calls, by_document, rtol=1e-5, atol=1e-6)


def test_a_changed_prefix_token_changes_its_own_document_alone() -> None:
    lengths, prefixes = [4, 6, 5], [0, 4, 3]
    documents = packed(lengths, prefixes)
    tensors = [x.detach() for x in inputs(15)]
    before = attend(tensors, documents)
    for tensor in tensors:
        tensor[7] += 1.0  # the last token of the second document's prefix
    after = attend(tensors, documents)
    changed = (after != before).any(dim=1)
    assert not changed[:4].any()
    assert changed[4:10].all(), "the prefix sees it, and so does all that follows"
    assert not changed[10:].any()
    for tensor in tensors:
        tensor[8] += 1.0  # the first one after the prefix
    assert torch.equal(attend(tensors, documents)[4:8], after[4:8]), "the prefix does not see what follows it"
    after = attend(tensors, documents)
    for tensor in tensors:
        tensor[9] += 1.0
    assert torch.equal(attend(tensors, documents)[4:9], after[4:9]), "what follows a prefix is causal"


def test_documents_without_a_prefix_take_the_usual_way() -> None:
    assert packed([3, 4], [0, 0]).prefixes is None


def test_gathered_keys_are_refused() -> None:
    device = torch.device("cpu")
    share = share_of([4], 4, 2, 0, "all_gather", device)
    with pytest.raises(LayoutError, match="context_parallel_method"):
        pack_documents(
            torch.tensor([0, 4], dtype=torch.int32),
            context_parallel_index(4, 4, 2, 0),
            4,
            SIZE,
            100.0,
            torch.float32,
            share=share,
            prefix_lengths=torch.tensor([2], dtype=torch.int32),
        )
