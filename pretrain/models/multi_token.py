"""Multi-token prediction: heads that predict tokens further ahead, for the sake of what the trunk learns.

Gloeckle et al., "Better & Faster Large Language Models via Multi-token Prediction", arXiv 2404.19737, section 2: every
head is a transformer layer of its own over the trunk's last hidden states, and all share the output layer. Their losses
are added as in DeepSeek-V3 (arXiv 2412.19437, equation 25), by which they weigh `loss_weight` together:

    minimised = main + loss_weight / depth · (loss of head 1 + … + loss of head depth)

Head k predicts from token i the token i + 1 + k. DeepSeek-V3's heads read, besides, the embeddings of the tokens in
between, which would put a copy of the embedding on the last pipeline stage; these need nothing that is not there, so
every layout computes the same.

    documents          a b c | d e f g        (the last label is the next sequence's first token, x)
    labels             b c .   e f g x        . : no document predicts the next one's first token
    ahead, head 1      c . .   f g x .        of the labels, those k further on in the same document
    ahead, head 2      . . .   g x . .
"""

from dataclasses import dataclass
from typing import Any

import torch

from parallel.engine import MegatronModule, build_module
from parallel.norms import FusedNorm, Norm
from parallel.spec import block_spec
from pretrain.microbatch import MicroBatch


class MultiTokenHeads(MegatronModule):  # type: ignore[misc]
    """The heads' layers and their norms; the output layer is the model's."""

    def __init__(
        self, config: Any, depth: int, pg_collection: Any, vp_stage: int | None, fused_norms: bool = False
    ) -> None:
        super().__init__(config=config)
        spec = block_spec(config, vp_stage, fused_norms).layer_specs[0]
        norm = FusedNorm if fused_norms else Norm
        self.depth = depth
        # One by one, not in a ModuleList, which megatron's sharded checkpoints do not look into.
        for number in range(depth):
            layer = build_module(spec, config=config, layer_number=1, pg_collection=pg_collection, vp_stage=vp_stage)
            setattr(self, f"layer_{number}", layer)
            setattr(self, f"norm_{number}", norm(config, config.hidden_size, config.layernorm_epsilon))

    def forward(self, hidden: torch.Tensor, documents: Any) -> list[torch.Tensor]:
        """`hidden` [tokens, 1, hidden_size], the trunk's last; each head's, of the same shape."""
        outs = []
        for number in range(self.depth):
            out, _ = getattr(self, f"layer_{number}")(
                hidden_states=hidden, attention_mask=None, packed_seq_params=documents
            )
            outs.append(getattr(self, f"norm_{number}")(out))
        return outs


@dataclass(frozen=True)
class AheadLabels:
    """What the heads are to predict."""

    labels: torch.Tensor
    """int64[depth, tokens]"""
    loss_mask: torch.Tensor
    """bool[depth, tokens]: False where the label is another document's, or carries no loss."""
    loss_weights: torch.Tensor | None
    """float32[depth, tokens]; None: all 1."""


def labels_ahead(microbatch: MicroBatch, depth: int) -> AheadLabels:
    """The labels of a whole micro-batch, on the CPU."""
    cu_seqlens = microbatch.cu_seqlens.long()
    ends = cu_seqlens[1:].repeat_interleave(cu_seqlens.diff())
    at = torch.arange(len(ends)) + torch.arange(1, depth + 1)[:, None]
    inside = at < ends
    at = at.clamp(max=len(ends) - 1)
    weights = microbatch.loss_weights
    return AheadLabels(
        labels=microbatch.labels[0][at].masked_fill(~inside, 0),
        loss_mask=inside & microbatch.loss_mask[0][at],
        loss_weights=None if weights is None else weights[0][at],
    )
