"""Prefix attention of packed documents: both directions inside a document's prefix, causal after it.

    keys ->   a b c | d e          a document of five tokens with a prefix of three
    a         x x x
    b         x x x                queries of the prefix: all of the prefix, nothing of the rest
    c         x x x
    d         x x x   x            the others: everything up to themselves
    e         x x x   x x

Raffel et al., arXiv 1910.10683, figure 4, right; Dong et al. (UniLM), arXiv 1905.03197. Two products give it exactly:
the prefixes' queries over the prefixes' keys without a mask, and the other queries over whole documents with the causal
mask aligned at the end (bottom right). So the varlen kernels serve, and no mask of tokens x tokens is made.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from parallel.varlen import Spans, Varlen


@dataclass(frozen=True)
class Prefixes:
    """Where the prefixes of a packed row are."""

    lengths: list[int]
    """Tokens of each document's prefix; 0: the document is causal."""
    inside: torch.Tensor
    """int64[prefix tokens]: their places in the row, ascending."""
    after: torch.Tensor
    """int64[other tokens]"""
    order: torch.Tensor
    """int64[tokens]: place of each token of the row in `inside` and `after`, one after the other."""
    cu_inside: torch.Tensor
    """int32[documents + 1]: where each document's prefix ends in `inside`, from 0."""
    cu_after: torch.Tensor
    """int32[documents + 1], likewise in `after`."""
    longest_inside: int
    longest_after: int


def find_prefixes(documents: Sequence[int], prefixes: Sequence[int], device: torch.device) -> Prefixes | None:
    """The places of prefixes in a row of documents of so many tokens each; None when all of them are causal."""
    if not any(prefixes):
        return None
    lengths, own = torch.tensor(documents), torch.tensor(prefixes)
    assert (own <= lengths).all(), "a prefix is a part of its document"
    begins = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)[:-1]])
    position = torch.arange(int(lengths.sum())) - begins.repeat_interleave(lengths)
    is_inside = position < own.repeat_interleave(lengths)
    inside, after = is_inside.nonzero()[:, 0], (~is_inside).nonzero()[:, 0]
    ends = [torch.cat([torch.zeros(1, dtype=torch.int64), each.cumsum(0)]).int() for each in (own, lengths - own)]
    return Prefixes(
        list(prefixes),
        inside.to(device),
        after.to(device),
        torch.cat([inside, after]).argsort().to(device),
        ends[0].to(device),
        ends[1].to(device),
        int(own.max()),
        int((lengths - own).max()),
    )


def by_document(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Sequence[int],
    prefixes: Prefixes,
    scale: float | None,
) -> torch.Tensor:
    """`query[tokens, heads, head_size]`, `key` and `value[tokens, groups, head_size]` to query's shape.

    lengths: tokens of each document.
    """
    grouped = query.size(1) != key.size(1)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool) -> None:
        q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)
        outs.append(out.squeeze(0).transpose(0, 1))

    outs: list[torch.Tensor] = []
    parts = (torch.split(x, list(lengths)) for x in (query, key, value))
    for prefix, q, k, v in zip(prefixes.lengths, *parts, strict=True):
        if not prefix:
            attend(q, k, v, None, True)
            continue
        attend(q[:prefix], k[:prefix], v[:prefix], None, False)
        if len(q) > prefix:
            ones = torch.ones(len(q) - prefix, len(k), dtype=torch.bool, device=q.device)
            attend(q[prefix:], k, v, ones.tril(prefix), False)
    return torch.cat(outs)


def in_two_calls(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Spans,
    prefixes: Prefixes,
    varlen: Varlen,
    scale: float | None,
) -> torch.Tensor:
    """As `by_document`, with the varlen kernel of a GPU."""
    at, spans = prefixes.inside, Spans(prefixes.cu_inside, prefixes.longest_inside)
    inside = varlen(query[at], key[at], value[at], spans, spans, False, scale)
    if not len(prefixes.after):
        return inside
    spans = Spans(prefixes.cu_after, prefixes.longest_after)
    after = varlen(query[prefixes.after], key, value, spans, documents, True, scale)
    return torch.cat([inside, after])[prefixes.order]
