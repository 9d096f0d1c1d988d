"""What a GPU's varlen kernel computes, piece by piece; as flash-attn documents it, causal is aligned to the last."""

import torch
import torch.nn.functional as F

from parallel.varlen import Spans


def aligned_to_the_last(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    queries: Spans,
    keys: Spans,
    causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """A `parallel.varlen.Varlen`: it knows where pieces start and no lengths."""
    outs = []
    q_starts, k_starts = queries.starts.tolist(), keys.starts.tolist()
    assert len(q_starts) == len(k_starts)
    for number in range(len(q_starts) - 1):
        q = query[q_starts[number] : q_starts[number + 1]].transpose(0, 1)
        k, v = (x[k_starts[number] : k_starts[number + 1]].transpose(0, 1) for x in (key, value))
        assert q.size(1) <= queries.longest
        assert k.size(1) <= keys.longest
        mask = torch.ones(q.size(1), k.size(1), dtype=torch.bool)
        mask = mask.tril(k.size(1) - q.size(1)) if causal else mask
        outs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True))
    return torch.cat(outs, dim=1).transpose(0, 1)
