"""Packed attention: each way to compute it agrees with a plain softmax on every document alone."""

from types import SimpleNamespace

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from parallel.attention import PackedAttention, PackedDocuments, pack_documents
from parallel.rotary import rotary_table, rotate

HEADS, SIZE = 4, 8


def attention() -> PackedAttention:
    one = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    return PackedAttention(config=None, pg_collection=SimpleNamespace(cp=one))


def packed(lengths: list[int]) -> PackedDocuments:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])
    return pack_documents(cu_seqlens, positions, max(lengths), SIZE, 100.0, torch.float32)


def inputs(tokens: int, groups: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [
        torch.randn(tokens, heads, SIZE, generator=generator, requires_grad=True) for heads in (HEADS, groups, groups)
    ]


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """One document: rotary embedding by rotation matrices, then softmax."""
    length, groups = query.size(0), key.size(1)
    frequencies = 100.0 ** (-torch.arange(0, SIZE, 2) / SIZE)

    def turn(x: torch.Tensor) -> torch.Tensor:
        rows = []
        for position in range(length):
            c, s = torch.diag((position * frequencies).cos()), torch.diag((position * frequencies).sin())
            matrix = torch.cat((torch.cat((c, -s), dim=1), torch.cat((s, c), dim=1)))
            rows.append(x[position] @ matrix.T)
        return torch.stack(rows)

    query, key = turn(query), turn(key).repeat_interleave(HEADS // groups, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) / SIZE**0.5
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
    out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value.repeat_interleave(HEADS // groups, 1))
    return out.reshape(length, -1)


@settings(deadline=None, max_examples=25)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), groups=st.sampled_from([1, 2, 4]))
@example(lengths=[5, 5, 5], groups=2)  # of one length: one call for all
def test_forward_and_backward_are_each_documents_own(lengths: list[int], groups: int) -> None:
    ours, theirs = inputs(sum(lengths), groups), inputs(sum(lengths), groups)
    out = attention()(*ours, None, packed_seq_params=packed(lengths))
    expected = torch.cat([plain(*parts) for parts in zip(*(x.split(lengths) for x in theirs), strict=True)])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_documents_do_not_leak_into_each_other() -> None:
    lengths = [4, 6, 2]
    tensors = [x.detach() for x in inputs(12, 2)]
    documents = packed(lengths)
    before = attention()(*tensors, None, packed_seq_params=documents)
    for tensor in tensors:
        tensor[4:10] += 100.0
    after = attention()(*tensors, None, packed_seq_params=documents)
    assert torch.equal(after[:4], before[:4])
    assert torch.equal(after[10:], before[10:])
    assert (after[4:10] != before[4:10]).any(dim=1).all()


def test_rotation_keeps_lengths_and_depends_on_distance_only() -> None:
    cos, sin = (table.unsqueeze(1) for table in rotary_table(50, SIZE, 10.0, torch.float32, torch.device("cpu")))
    x = torch.randn(1, 2, SIZE, generator=torch.Generator().manual_seed(0)).expand(50, 2, SIZE)
    turned = rotate(x, cos, sin)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    products = torch.einsum("qhd,khd->hqk", turned, turned)
    for distance in (1, 7):
        diagonal = products.diagonal(distance, 1, 2)
        torch.testing.assert_close(diagonal, diagonal[:, :1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
