"""The largest attention logit of a packed micro-batch: exact, and without ever holding all logits.

Flash kernels have no logits to look at, so a measured step multiplies queries and keys once more. Queries are taken a
stretch at a time, and a stretch [a, b) sees two blocks of keys, whatever the number of documents in it:

    keys [d, a)   of the document that goes on into the stretch, from its beginning d; its queries see all of them
    keys [a, b)   under a mask: no later key, none of another document

so that little is computed that no query sees, and never more than `LOGITS` numbers are held.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate, pairwise

import torch

from parallel import accelerator
from parallel.attention import PackedDocuments

QUERIES = 512 if accelerator.has_gpu() else 128
"""Queries at a time. On CPU 128 take 7.0 ms where 32 take 16.1 (1,024 tokens in documents of 300, 4 heads)."""
LOGITS = 1 << 26
"""Logits held at once: 128 MiB in half precision."""


@torch.no_grad()
def largest_logit(
    query: torch.Tensor, key: torch.Tensor, documents: PackedDocuments, scale: float | None = None
) -> torch.Tensor:
    """float32[]: max of scale·q·k over all heads, queries, and keys that the query may attend to.

    `query[queries, heads, head_size]` and `key[keys, groups, head_size]` as the attention kernel gets them, rotated and
    normalised; `scale` is 1/√head_size when None. Infinite when any logit is not a number.
    """
    heads, groups, width = query.size(1), key.size(1), query.size(2)
    keys = key.permute(1, 2, 0)
    found = []
    for begin, end, first, last, allowed in _blocks(documents, query, heads):
        # Query heads that share a key head stand below one another: one product for each key head.
        rows = query[begin:end].view(end - begin, groups, heads // groups, width).permute(1, 2, 0, 3)
        rows = rows.reshape(groups, -1, width)
        if allowed is None:
            logits = torch.bmm(rows, keys[:, :, first:last])
        else:
            barred = torch.zeros(allowed.shape, dtype=query.dtype, device=query.device)
            barred = barred.masked_fill_(~allowed, -math.inf).repeat(heads // groups, 1)
            logits = torch.baddbmm(barred.unsqueeze(0), rows, keys[:, :, first:last])
        found.append(logits.amax())
    largest = torch.stack(found).amax().float() * (width**-0.5 if scale is None else scale)
    return torch.nan_to_num(largest, nan=math.inf, posinf=math.inf, neginf=-math.inf)


def _blocks(
    documents: PackedDocuments, query: torch.Tensor, heads: int
) -> Iterator[tuple[int, int, int, int, torch.Tensor | None]]:
    """(first query, end, first key, end, bool[queries, keys] of who may attend to what, None for all to all)."""
    queries, lengths = query.size(0), documents.query_lengths
    if documents.prefixes is not None or documents.key_lengths != lengths:
        yield from _pieces(documents, heads, query.device)
        return
    edges = [0, *accumulate(lengths)]
    starts = documents.cu_seqlens_q[:-1].repeat_interleave(
        torch.diff(documents.cu_seqlens_q), output_size=queries
    )  # int32[queries]: where each one's document begins
    place = torch.arange(queries, dtype=torch.int32, device=query.device)
    size = _size(heads * max(QUERIES, *lengths))
    for begin in range(0, queries, size):
        end, number = min(begin + size, queries), bisect_right(edges, begin)
        if edges[number - 1] < begin:
            yield begin, min(end, edges[number]), edges[number - 1], begin, None
        keys = place[begin:end]
        yield begin, end, begin, end, (keys >= starts[begin:end, None]) & (keys <= keys[:, None])


def _pieces(
    documents: PackedDocuments, heads: int, device: torch.device
) -> Iterator[tuple[int, int, int, int, torch.Tensor | None]]:
    """The same where a piece of a document has more keys than queries (context parallelism), or a prefix."""
    edges, key_edges = ([0, *accumulate(lengths)] for lengths in (documents.query_lengths, documents.key_lengths))
    prefixes = documents.prefixes.lengths if documents.prefixes else [0] * len(documents.key_lengths)
    for (first, last), (keys, keys_end), prefix in zip(pairwise(edges), pairwise(key_edges), prefixes, strict=True):
        size = _size(heads * (keys_end - keys))
        for begin in range(first, last, size):
            end = min(begin + size, last)
            own = keys_end - (last - end)  # the last of these queries' own key, and one
            seen = max(own, keys + prefix)
            place = torch.arange(keys, seen, device=device)
            newest = torch.arange(own - (end - begin), own, device=device).clamp(min=keys + prefix - 1)
            yield begin, end, keys, seen, place <= newest[:, None]


def _size(logits_of_a_query: int) -> int:
    return max(16, min(QUERIES, LOGITS // logits_of_a_query))
