"""Context parallelism: ranks that share the tokens of every sequence, and how attention then sees whole documents.

Each row of `seq_len` tokens is cut into 2·cp pieces and rank r holds pieces r and 2·cp-1-r, so that every rank has the
same share of early (cheap) and late (dear) queries, as in Llama 3 (arXiv 2407.21783, section 3.3.2). With cp = 2, two
documents `a` (5 tokens) and `b` (3) in a row of 8:

    tokens   a0 a1 | a2 a3 | a4 b0 | b1 b2
    rank 0   a0 a1                   b1 b2      queries a0-a1 see a0-a1, b1-b2 see b0-b2
    rank 1           a2 a3   a4 b0              queries a2-a4 see a0-a4, b0 sees b0

Two ways to compute that:

* all-gather: every rank gathers all keys and values; each run of its queries that are neighbours in one document sees
  that document's keys up to its own last token. Moves 2·groups·head_size numbers a token, whatever cp is.
* all-to-all (Ulysses, arXiv 2309.14509): ranks swap tokens for heads, compute whole documents of heads/cp heads, and
  swap back. Moves 1/cp of (2·heads + 2·groups)·head_size numbers a token, and needs groups divisible by cp.
"""

from dataclasses import dataclass

import torch

from parallel.engine import all_to_all, gather_from_sequence_parallel_region
from parallel.layout import ContextParallelMethod


def context_parallel_index(tokens: int, seq_len: int, cp_size: int, cp_rank: int) -> torch.Tensor:
    """int64: which of a micro-batch's `tokens` a context-parallel rank holds, rows of `seq_len` one after another."""
    pieces = torch.arange(tokens).view(tokens // seq_len, 2 * cp_size, seq_len // (2 * cp_size))
    return pieces[:, [cp_rank, 2 * cp_size - 1 - cp_rank]].reshape(-1)


@dataclass(frozen=True)
class Share:
    """One rank's part in a micro-batch, as attention needs it; indices are on the device."""

    method: ContextParallelMethod
    query_lengths: list[int]
    """Queries of each piece of work: neighbours in one document, in the order in which attention gets them."""
    key_lengths: list[int]
    """Keys that each piece's last query sees; every query before it sees one less than the next."""
    rows: torch.Tensor
    """int64: what to take, in this order, of the tokens as a collective leaves them: rank 0's, rank 1's, and so on. For
    an all-gather the keys of each piece, for an all-to-all all tokens in the order of the micro-batch."""
    back: torch.Tensor | None
    """int64[tokens]: the inverse of `rows`, for an all-to-all."""


def share_of(
    document_lengths: list[int],
    seq_len: int,
    cp_size: int,
    cp_rank: int,
    method: ContextParallelMethod,
    device: torch.device,
) -> Share:
    """What rank `cp_rank` of `cp_size` does for a micro-batch of documents one after another, `document_lengths` long,
    in rows of `seq_len`."""
    tokens = sum(document_lengths)
    held = [context_parallel_index(tokens, seq_len, cp_size, rank) for rank in range(cp_size)]
    place = torch.empty(tokens, dtype=torch.int64)  # of each token in what a collective brings
    place[torch.cat(held)] = torch.arange(tokens)
    if method == "all_to_all":
        return Share(method, document_lengths, document_lengths, place.to(device), torch.cat(held).to(device))
    lengths = torch.tensor(document_lengths)
    starts = lengths.cumsum(0) - lengths
    own = held[cp_rank]
    start = torch.repeat_interleave(starts, lengths)[own]  # of each query's document
    begins = torch.ones(len(own), dtype=torch.bool)
    begins[1:] = (own[1:] != own[:-1] + 1) | (start[1:] != start[:-1])
    first = begins.nonzero()[:, 0]
    query_lengths = torch.diff(first, append=torch.tensor([len(own)]))
    begin, end = start[first], own[first] + query_lengths
    rows = torch.cat([place[a:b] for a, b in zip(begin.tolist(), end.tolist(), strict=True)])
    return Share(method, query_lengths.tolist(), (end - begin).tolist(), rows.to(device), None)


def gather_keys(
    key: torch.Tensor, value: torch.Tensor, share: Share, group: torch.distributed.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[local tokens, groups, head_size]` of this rank to `[sum(share.key_lengths), groups, head_size]`."""
    both = gather_from_sequence_parallel_region(torch.stack((key, value), dim=1), group=group)
    key, value = both.index_select(0, share.rows).unbind(1)
    return key, value


def tokens_to_heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, share: Share, group: torch.distributed.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`[local tokens, n, head_size]` of all heads to `[tokens, n / cp, head_size]` of this rank's heads, in the order
    of the micro-batch; `n` is the number of query heads, and of groups for `key` and `value`.

    Rank r gets the r-th part of the heads and of the groups, so that a query head stays with its key/value head.
    """
    cp, local = group.size(), query.size(0)
    # One collective for all three; a leading dimension of receivers.
    parts = [x.view(local, cp, x.size(1) // cp, x.size(2)) for x in (query, key, value)]
    counts = [part.size(2) for part in parts]
    sent = torch.cat(parts, dim=2).transpose(0, 1)
    received = all_to_all(group, sent).reshape(cp * local, sum(counts), query.size(2))
    query, key, value = received.index_select(0, share.rows).split(counts, dim=1)
    return query, key, value


def heads_to_tokens(out: torch.Tensor, share: Share, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """`[tokens, heads / cp, head_size]` back to `[local tokens, heads, head_size]`."""
    cp, (tokens, heads, size) = group.size(), out.shape
    assert share.back is not None
    sent = out.index_select(0, share.back).view(cp, tokens // cp, heads, size)
    received: torch.Tensor = all_to_all(group, sent)
    return received.transpose(0, 1).reshape(tokens // cp, cp * heads, size)
