"""A transformer layer that leaves its residual additions to the norms behind them.

In megatron-core's layer the addition and the norm are two operators with the residual stream written and read again in
between, and autograd adds the stream's two gradients in a third. Here they are one, forward and backward
(`parallel/kernels/residual_norm.py`):

    megatron-core       n = input_norm(h);  h' = h + attention(n);  m = mlp_norm(h');  h'' = h' + mlp(m)
    ResidualNormLayer   n given;  m, h' = mlp_norm.add(attention(n), h);  n'', h'' = next_norm.add(mlp(m), h')

`next_norm` is the input norm of the layer that follows. A layer gives (h'', n''), which TransformerBlock hands to the
next one as `hidden_states` and `context` (there is no cross-attention, whose `context` it would be). A layer with no
`next_norm` adds as megatron-core does and gives no n''; one that is given no n computes it. So a layer's first output
is what it always was, and parameters keep their names.

`link` says which norm follows which layer, wherever a layer may use a neighbour's weights and n'' need not be kept.
"""

from functools import partial
from itertools import pairwise
from typing import Any

import torch

from parallel.engine import TransformerLayer, tensor_parallel
from parallel.norms import FusedLayerNorm, FusedRMSNorm

FusedNorms = (FusedRMSNorm, FusedLayerNorm)


class ResidualNormLayer(TransformerLayer):  # type: ignore[misc]
    """TransformerLayer for training and evaluation of decoders without dropout, whose norms are `FusedNorm`s."""

    output_square_sum: torch.Tensor | None = None
    """float32[tokens]: sums of squares of the rows of the last forward pass's output; None where no norm followed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert self.hidden_dropout == 0, "the fused addition has no dropout"
        assert not self.recompute_input_layernorm, "norms are not recomputed"
        # In a tuple, or the next layer's norm would become this one's parameters as well.
        self._next_norm: tuple[FusedRMSNorm | FusedLayerNorm, ...] = ()

    def followed_by(self, norm: FusedRMSNorm | FusedLayerNorm) -> None:
        """From now on end with the addition and `norm` in one."""
        self._next_norm = (norm,)

    def forward(
        self,
        hidden_states: torch.Tensor,
        context: torch.Tensor | None = None,
        context_mask: None = None,
        padding_mask: torch.Tensor | None = None,
        **attention_inputs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(output, its norm by the next layer's), both [tokens, batch, hidden_size] as `hidden_states`.

        `context` is the norm of `hidden_states`, computed by the layer before, or None.
        """
        normalised = self.input_layernorm(hidden_states) if context is None else context
        attended = _with_bias(*self.self_attention(normalised, **attention_inputs))
        normalised, hidden_states, _ = self.pre_mlp_layernorm.add(attended, hidden_states)
        mlp = partial(self.mlp, padding_mask=padding_mask)
        outputs = tensor_parallel.checkpoint(mlp, False, normalised) if self.recompute_mlp else mlp(normalised)
        if not self._next_norm:
            self.output_square_sum = None
            return self._forward_post_mlp(outputs, hidden_states), None
        (norm,) = self._next_norm
        following, hidden_states, square_sum = norm.add(_with_bias(*outputs), hidden_states)
        self.output_square_sum = square_sum.detach()
        return hidden_states, following


def link(chunk: Any) -> None:
    """Have every layer of a model chunk end with the norm of the next one in it.

    Not with recomputation of whole layers, which would keep n'' beside h'' for each of them; nor with fully sharded
    weights, of which a layer has only its own at hand while it runs.
    """
    layers = [layer for layer in chunk.decoder.layers if isinstance(layer, ResidualNormLayer)]
    if chunk.config.recompute_granularity == "full":
        return
    for layer, following in pairwise(layers):
        layer.followed_by(following.input_layernorm)


def _with_bias(output: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return output if bias is None else output + bias
