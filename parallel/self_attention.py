"""Self-attention whose queries and keys are normalised and rotated in one pass, out of the fused QKV projection.

megatron-core's `SelfAttention` splits the projection's output and normalises queries and keys; our core attention
rotates them. That is three to five passes over them, and as many copies kept for the backward pass. Here it is one
(`parallel/kernels/qk_norm_rope.py`), between the projection and the core attention:

    linear_qkv  →  qk_norm_rope  →  core attention, which finds everything rotated  →  linear_proj

Parameters and their names are megatron's, so checkpoints are the same with and without it.
"""

from typing import Any

import torch

from parallel.attention import PackedDocuments
from parallel.engine import IdentityOp, SelfAttention
from parallel.kernels import qk_norm_rope


class FusedSelfAttention(SelfAttention):  # type: ignore[misc]
    """megatron-core's self-attention over `PackedDocuments`, with `kernels.qk_norm_rope` fused."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.core_attention.rotates = False
        self._documents: PackedDocuments | None = None

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, *args: Any, **named: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`hidden_states` [tokens, 1, hidden_size]; (output of the same shape, its bias)."""
        # megatron calls get_query_key_value_tensors from here, and does not hand the documents on to it
        self._documents = named.get("packed_seq_params")
        try:
            output: tuple[torch.Tensor, torch.Tensor | None] = super().forward(
                hidden_states, attention_mask, *args, **named
            )
            return output
        finally:
            self._documents = None

    def get_query_key_value_tensors(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> tuple[torch.Tensor, ...]:
        """Queries [tokens, 1, heads, head_size], keys and values [tokens, 1, groups, head_size] of this rank, ready to
        be multiplied."""
        documents = self._documents
        assert documents is not None, "every batch is packed; call the model with packed_seq_params"
        assert documents.rotary is not None
        assert documents.positions is not None
        groups = self.num_query_groups_per_partition
        in_group = self.num_attention_heads_per_partition // groups + 2
        mixed, _ = self.linear_qkv(hidden_states)
        parts = qk_norm_rope.fused(
            mixed.view(mixed.size(0), groups, in_group, self.hidden_size_per_attention_head),
            documents.positions,
            *documents.rotary,
            self._norm(),
            with_lengths=self.core_attention.observer is not None,
        )
        if parts.lengths is not None:
            self.core_attention.lengths = parts.lengths[:, :, :-1], parts.lengths[:, :, -1]
        return parts.query.unsqueeze(1), parts.key.unsqueeze(1), parts.value.unsqueeze(1)

    def _norm(self) -> qk_norm_rope.HeadNorm | None:
        query, key = self.q_layernorm, self.k_layernorm
        if isinstance(query, IdentityOp):
            return None
        biases = getattr(query, "bias", None), getattr(key, "bias", None)  # RMSNorm has none
        return qk_norm_rope.HeadNorm(query.weight, key.weight, *biases, query.eps)
