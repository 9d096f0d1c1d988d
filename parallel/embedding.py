"""The input embedding with the fused gradient of its table (`parallel/kernels/embedding.py`).

A table that megatron-core's DistributedDataParallel wraps has `main_grad`, the fp32 sum of a step's gradients. The
fused backward pass adds to the rows of it that a micro-batch has tokens of, instead of making a gradient as large as
the table and having all of it added. Elsewhere (fully sharded weights, gradients that are reduced during the backward
pass, models that are not wrapped) it makes that gradient.
"""

from typing import Any

import torch

from parallel.engine import VocabParallelEmbedding, tensor_parallel
from parallel.kernels import embedding


class SortedEmbedding(VocabParallelEmbedding):  # type: ignore[misc]
    """megatron-core's VocabParallelEmbedding; tied or not, on one rank or split by rows over tensor-parallel ones."""

    sums_directly: bool
    """Whether a backward pass may leave the table without a gradient of its own, see `use_sorted_gradient`."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """`tokens` int64[1, tokens] → [1, tokens, hidden_size], or this rank's [tokens / tp, 1, hidden_size] where the
        output is scattered for sequence parallelism."""
        first = self.vocab_start_index if self.tp_group.size() > 1 else None
        total = getattr(self.weight, "main_grad", None) if self.sums_directly and self.weight.requires_grad else None
        found = embedding.fused(tokens, self.weight, first, total)
        if self.reduce_scatter_embeddings:
            return tensor_parallel.reduce_scatter_to_sequence_parallel_region(  # type: ignore[no-any-return]
                found.transpose(0, 1).contiguous(), group=self.tp_group
            )
        return tensor_parallel.reduce_from_tensor_model_parallel_region(  # type: ignore[no-any-return]
            found, group=self.tp_group
        )


def use_sorted_gradient(chunk: Any, overlap_grad_reduce: bool) -> None:
    """Let a model chunk that begins a pipeline compute its embedding's gradient from sorted tokens.

    With `overlap_grad_reduce` gradients are reduced while a backward pass runs, and DistributedDataParallel insists
    that a parameter that is ready has one; the table then gets a gradient of its own.
    """
    module = chunk.embedding.word_embeddings
    assert type(module) is VocabParallelEmbedding
    module.__class__ = SortedEmbedding  # the same weights and names; GPTModel has no spec for its embedding
    module.sums_directly = not overlap_grad_reduce
