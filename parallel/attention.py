"""Causal attention of packed documents: no token ever sees a token of another document.

A micro-batch is one row of tokens, documents one after another (`cu_seqlens`). `PackedDocuments` carries what every
layer needs of it; `PackedAttention` is the core attention that plugs into megatron-core's `SelfAttention`. Two ways
to compute the same thing:

* varlen flash attention (`varlen.py`): on a GPU in half precision.
* document by document: `scaled_dot_product_attention` on each. On CPU 142 ms where a dense mask takes 674 (2 x 2048
  tokens, documents of about 300).

Under context parallelism a rank has pieces of documents, or whole documents of some heads: see `context_parallel.py`.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from headrace.errors import LayoutError
from parallel import prefix_attention
from parallel.context_parallel import Share, gather_keys, heads_to_tokens, tokens_to_heads
from parallel.engine import MegatronModule, PackedSeqParams
from parallel.rope_scaling import RopeScaling
from parallel.rotary import rotary_table, rotate
from parallel.varlen import Spans, varlen_kernel


@dataclass
class PackedDocuments(PackedSeqParams):  # type: ignore[misc]
    """What attention needs to know of a packed micro-batch; megatron-core hands it through to every layer.

    Attention works on pieces: query i of n of a piece sees all but the last n-1-i of the piece's keys. Without context
    parallelism the pieces are the documents; `cu_seqlens_q` and `cu_seqlens_kv` are where their queries and keys start.
    """

    query_lengths: list[int] = field(default_factory=list)
    """Queries of each piece."""
    key_lengths: list[int] = field(default_factory=list)
    """Keys of each piece; as many as queries, or more."""
    cos: torch.Tensor | None = None
    """[local tokens, 1, head_size / 2], by each token's position in its document."""
    sin: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    """int64[local tokens]: each token's position in its document, a row of `rotary`."""
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    """Cosines and sines of all positions, [positions, head_size / 2] each."""
    share: Share | None = None
    """This rank's part, under context parallelism."""
    prefixes: prefix_attention.Prefixes | None = None
    """Where tokens see later ones; None: nowhere."""


def pack_documents(
    cu_seqlens: torch.Tensor,
    position_ids: torch.Tensor,
    max_position: int,
    head_size: int,
    rope_base: float,
    dtype: torch.dtype,
    share: Share | None = None,
    rope_scaling: RopeScaling | None = None,
    prefix_lengths: torch.Tensor | None = None,
) -> PackedDocuments:
    """What attention needs of the documents that end at `cu_seqlens[1:]` (int32[documents + 1], on the CPU).

    `position_ids` (int64[local tokens]) are positions within documents, below `max_position`; they are on the device.
    `prefix_lengths` (int32[documents], on the CPU) are tokens at the begin of documents that see one another in both
    directions; where keys are gathered there are none.
    """
    cos, sin = rotary_table(max_position, head_size, rope_base, dtype, position_ids.device, rope_scaling)
    lengths: list[int] = torch.diff(cu_seqlens).tolist()
    query_lengths, key_lengths = (share.query_lengths, share.key_lengths) if share else (lengths, lengths)
    query_starts = key_starts = _starts(query_lengths, position_ids.device)
    if key_lengths is not query_lengths:
        key_starts = _starts(key_lengths, position_ids.device)
    prefixes = None
    if prefix_lengths is not None:
        if share is not None and share.method == "all_gather":
            raise LayoutError(
                "parallel.context_parallel_method: objectives whose input is seen in both directions need all_to_all; "
                "set it so, or `bidirectional: false` on them"
            )
        prefixes = prefix_attention.find_prefixes(lengths, prefix_lengths.tolist(), position_ids.device)
    return PackedDocuments(
        qkv_format="thd",
        cu_seqlens_q=query_starts,
        cu_seqlens_kv=key_starts,
        max_seqlen_q=max(query_lengths),
        max_seqlen_kv=max(key_lengths),
        query_lengths=query_lengths,
        key_lengths=key_lengths,
        cos=cos[position_ids].unsqueeze(1),
        sin=sin[position_ids].unsqueeze(1),
        positions=position_ids,
        rotary=(cos, sin),
        share=share,
        prefixes=prefixes,
    )


def _starts(lengths: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)


Pair = tuple[torch.Tensor, torch.Tensor]


class PackedAttention(MegatronModule):  # type: ignore[misc]
    """Core attention over `PackedDocuments`: rotary embedding, then softmax(q·kᵀ/√d)·v within each document.

    Fewer key/value than query heads (GQA, arXiv 2305.13245) are allowed.
    """

    observer: Callable[[Pair, Pair, PackedDocuments], None] | None = None
    """Is shown, in measured steps (`pretrain.dynamics`), the lengths (2-norms) of the queries and keys of this rank's
    tokens, and the queries and keys that it multiplies; under context parallelism those are others."""
    rotates: bool = True
    """False: queries and keys come rotated (`parallel/self_attention.py`)."""
    lengths: Pair | None = None
    """With `rotates` off and an observer: the lengths, float32[tokens, ...] of queries and of keys."""

    def __init__(self, config: Any, softmax_scale: float | None = None, pg_collection: Any = None, **_: Any) -> None:
        super().__init__(config=config)
        self.cp_group = pg_collection.cp
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        packed_seq_params: PackedDocuments | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """`query[tokens, heads, head_size]`, `key` and `value[tokens, groups, head_size]` to `[tokens, hidden]`."""
        documents = packed_seq_params
        assert documents is not None, "every batch is packed; call the model with packed_seq_params"
        assert documents.cos is not None
        assert documents.sin is not None
        if self.rotates:
            query = rotate(query, documents.cos, documents.sin)
            key = rotate(key, documents.cos, documents.sin)
            if self.observer is not None:
                self.lengths = _lengths(query), _lengths(key)
        lengths, share, self.lengths = self.lengths, documents.share, None
        swaps = share is not None and share.method == "all_to_all"
        if share is not None and swaps:
            query, key, value = tokens_to_heads(query, key, value, share, self.cp_group)
        elif share is not None:
            key, value = gather_keys(key, value, share, self.cp_group)
        if self.observer is not None and lengths is not None:
            self.observer(lengths, (query, key), documents)
        out = _attend(query, key, value, documents, self.softmax_scale)
        if share is not None and swaps:
            out = heads_to_tokens(out, share, self.cp_group)
        return out.reshape(out.size(0), -1)


def _lengths(heads: torch.Tensor) -> torch.Tensor:
    """float32[tokens, heads]"""
    lengths: torch.Tensor = torch.linalg.vector_norm(heads.detach(), dim=-1, dtype=torch.float32)
    return lengths


def active_kernel(dtype: torch.dtype) -> str:
    """Name of the kernel that packed attention uses for `dtype` on this machine, for people."""
    kernel = varlen_kernel(dtype)
    return kernel.__name__ if kernel else "document by document (scaled_dot_product_attention)"


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: PackedDocuments, scale: float | None
) -> torch.Tensor:
    varlen, prefixes = varlen_kernel(query.dtype), documents.prefixes
    if varlen is None:
        if prefixes is None:
            return _piece_by_piece(query, key, value, documents, scale)
        return prefix_attention.by_document(query, key, value, documents.query_lengths, prefixes, scale)
    keys = Spans(documents.cu_seqlens_kv, documents.max_seqlen_kv)
    if prefixes is not None:
        return prefix_attention.in_two_calls(query, key, value, keys, prefixes, varlen, scale)
    queries = Spans(documents.cu_seqlens_q, documents.max_seqlen_q)
    return varlen(query, key, value, queries, keys, True, scale)


def _piece_by_piece(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: PackedDocuments, scale: float | None
) -> torch.Tensor:
    grouped = query.size(1) != key.size(1)
    query_lengths, key_lengths = documents.query_lengths, documents.key_lengths
    same = query_lengths == key_lengths
    if same and len(query_lengths) > 1 and min(query_lengths) == max(query_lengths):
        # One call for all: 128 documents of 8 tokens, forward and backward, take 2.5 ms on a CPU instead of 20.7.
        q, k, v = (
            part.reshape(len(query_lengths), query_lengths[0], *part.shape[1:]).transpose(1, 2)
            for part in (query, key, value)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2).flatten(0, 1)
    outs = []
    split = torch.split(query, query_lengths), torch.split(key, key_lengths), torch.split(value, key_lengths)
    for parts in zip(*split, strict=True):
        q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in parts)
        queries, keys = q.size(2), k.size(2)
        # scaled_dot_product_attention aligns is_causal to the first query and key, not to the last.
        causal, mask = queries == keys, None
        if not causal:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril_(keys - queries)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)
        outs.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(outs)
