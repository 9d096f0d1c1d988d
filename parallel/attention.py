"""Causal attention of packed documents: no token ever sees a token of another document.

A micro-batch is one row of tokens, documents one after another (`cu_seqlens`). `PackedDocuments` carries what every
layer needs of it; `PackedAttention` is the core attention that plugs into megatron-core's `SelfAttention`. Three ways
to compute the same thing, best first:

* varlen flash attention: on a GPU in half precision.
* document by document: `scaled_dot_product_attention` on each. On CPU 142 ms where a dense mask takes 674 (2 x 2048
  tokens, documents of about 300).
* a dense mask: under context parallelism, where a rank holds pieces of documents and gathers all keys and values.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from headrace.errors import LayoutError
from parallel import accelerator, prefix_attention
from parallel.engine import MegatronModule, PackedSeqParams, gather_from_sequence_parallel_region
from parallel.rotary import rotary_table, rotate


@dataclass
class PackedDocuments(PackedSeqParams):  # type: ignore[misc]
    """What attention needs to know of a packed micro-batch; megatron-core hands it through to every layer."""

    lengths: list[int] = field(default_factory=list)
    """Tokens of each document."""
    cos: torch.Tensor | None = None
    """[local tokens, 1, head_size / 2], by each token's position in its document."""
    sin: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    """bool[local queries, gathered keys], only under context parallelism."""
    prefixes: prefix_attention.Prefixes | None = None
    """Where tokens see later ones; None: nowhere."""


def pack_documents(
    cu_seqlens: torch.Tensor,
    position_ids: torch.Tensor,
    max_position: int,
    head_size: int,
    rope_base: float,
    dtype: torch.dtype,
    token_index: torch.Tensor | None = None,
    gathered_index: torch.Tensor | None = None,
    prefix_lengths: torch.Tensor | None = None,
) -> PackedDocuments:
    """What attention needs of the documents that end at `cu_seqlens[1:]` (int32[documents + 1], on the CPU).

    `position_ids` (int64[local tokens]) are positions within documents, below `max_position`; they are on the device.
    Under context parallelism `token_index` (int64[local tokens]) says which tokens of the micro-batch this rank
    holds, and `gathered_index` (int64[tokens]) which ones an all-gather over the context-parallel ranks brings, in
    its order. `prefix_lengths` (int32[documents], on the CPU) are tokens at the begin of documents that see one another
    in both directions; there are none under context parallelism.
    """
    cos, sin = rotary_table(max_position, head_size, rope_base, dtype, position_ids.device)
    lengths: list[int] = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    mask = prefixes = None
    if prefix_lengths is not None:
        if token_index is not None:
            raise LayoutError(
                "parallel.context_parallel_size: objectives whose input is seen in both directions need it to be 1; "
                "set it to 1, or `bidirectional: false` on them"
            )
        prefixes = prefix_attention.find_prefixes(lengths, prefix_lengths.tolist(), position_ids.device)
    if token_index is not None and gathered_index is not None:
        document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        same = document[token_index][:, None] == document[gathered_index][None]
        mask = (same & (token_index[:, None] >= gathered_index[None])).to(position_ids.device)
    on_device = cu_seqlens.to(position_ids.device, non_blocking=True)
    longest = max(lengths)
    return PackedDocuments(
        qkv_format="thd",
        cu_seqlens_q=on_device,
        cu_seqlens_kv=on_device,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        lengths=lengths,
        cos=cos[position_ids].unsqueeze(1),
        sin=sin[position_ids].unsqueeze(1),
        mask=mask,
        prefixes=prefixes,
    )


def context_parallel_index(tokens: int, seq_len: int, cp_size: int, cp_rank: int) -> torch.Tensor:
    """int64: which of a micro-batch's `tokens` a context-parallel rank holds.

    Each row of `seq_len` is cut into 2·cp_size pieces and rank r takes pieces r and 2·cp_size-1-r, so that every rank
    has the same share of early (cheap) and late (dear) queries, as in Llama 3 (arXiv 2407.21783, section 3.3.2).
    """
    pieces = torch.arange(tokens).view(tokens // seq_len, 2 * cp_size, seq_len // (2 * cp_size))
    return pieces[:, [cp_rank, 2 * cp_size - 1 - cp_rank]].reshape(-1)


class PackedAttention(MegatronModule):  # type: ignore[misc]
    """Core attention over `PackedDocuments`: rotary embedding, then softmax(q·kᵀ/√d)·v within each document.

    Fewer key/value than query heads (GQA, arXiv 2305.13245) are allowed.
    """

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
        query = rotate(query, documents.cos, documents.sin)
        key = rotate(key, documents.cos, documents.sin)
        if documents.mask is not None:
            key, value = (gather_from_sequence_parallel_region(x, group=self.cp_group) for x in (key, value))
            out = _dense(query, key, value, documents.mask, self.softmax_scale)
        elif documents.prefixes is not None:
            out = _with_prefixes(query, key, value, documents, documents.prefixes, self.softmax_scale)
        elif (varlen := _varlen_kernel(query.dtype)) is not None:
            out = varlen(query, key, value, documents, self.softmax_scale)
        else:
            out = _document_by_document(query, key, value, documents.lengths, self.softmax_scale)
        return out.reshape(out.size(0), -1)


def active_kernel(dtype: torch.dtype) -> str:
    """Name of the kernel that packed attention uses for `dtype` on this machine, for people."""
    kernel = _varlen_kernel(dtype)
    return kernel.__name__.removeprefix("_") if kernel else "document by document (scaled_dot_product_attention)"


Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, PackedDocuments, float | None], torch.Tensor]


@functools.cache
def _varlen_kernel(dtype: torch.dtype) -> Kernel | None:
    """The varlen kernel for this device and dtype; flash-attn before torch's, which wraps an older version of it."""
    if not accelerator.has_gpu() or dtype not in (torch.bfloat16, torch.float16):
        return None
    if importlib.util.find_spec("flash_attn"):
        return _flash_attn
    return _torch_varlen


def _flash_attn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: PackedDocuments, scale: float | None
) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func

    cu_seqlens, longest = documents.cu_seqlens_q, documents.max_seqlen_q
    out: torch.Tensor = flash_attn_varlen_func(
        query, key, value, cu_seqlens, cu_seqlens, longest, longest, softmax_scale=scale, causal=True
    )
    return out


def _torch_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: PackedDocuments, scale: float | None
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    cu_seqlens, longest = documents.cu_seqlens_q, documents.max_seqlen_q
    out: torch.Tensor = varlen_attn(
        query,
        key,
        value,
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        scale=scale,
        window_size=(-1, 0),
        enable_gqa=query.size(1) != key.size(1),
    )
    return out


def _with_prefixes(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: PackedDocuments,
    prefixes: prefix_attention.Prefixes,
    scale: float | None,
) -> torch.Tensor:
    if _varlen_kernel(query.dtype) is None:
        return prefix_attention.by_document(query, key, value, documents.lengths, prefixes, scale)
    cu_seqlens, longest = documents.cu_seqlens_q, documents.max_seqlen_q
    return prefix_attention.varlen(query, key, value, cu_seqlens, longest, prefixes, scale)


def _document_by_document(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], scale: float | None
) -> torch.Tensor:
    grouped = query.size(1) != key.size(1)
    if len(lengths) > 1 and min(lengths) == max(lengths):
        # One call for all: 128 documents of 8 tokens, forward and backward, take 2.5 ms on a CPU instead of 20.7.
        q, k, v = (
            part.reshape(len(lengths), lengths[0], *part.shape[1:]).transpose(1, 2) for part in (query, key, value)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2).flatten(0, 1)
    outs = []
    for parts in zip(torch.split(query, lengths), torch.split(key, lengths), torch.split(value, lengths), strict=True):
        q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in parts)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
        outs.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(outs)


def _dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float | None
) -> torch.Tensor:
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    grouped = query.size(1) != key.size(1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return out.squeeze(0).transpose(0, 1)
