"""What forward passes show: queries, keys, logits of attention, block outputs, output logits.

Means and maxima are over every token that the model is given in the step, on whichever rank it is. Hooks count only
while a forward pass of the schedule runs: what recomputation runs again in a backward pass is not seen twice.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from parallel.attention import PackedAttention, PackedDocuments, Pair
from parallel.kernels.linear_cross_entropy import HeadLoss
from pretrain.dynamics.attention import largest_logit
from pretrain.dynamics.totals import Totals


class Activations:
    """Hooks on a model's blocks, attentions and output layer, adding to `totals`."""

    def __init__(self, chunks: Sequence[Any], totals: Totals) -> None:
        self._chunks, self._totals = chunks, totals
        self._handles: list[Any] = []
        self._attentions: list[PackedAttention] = []
        self._open = False
        self._main = False
        """The output layer has not run yet: multi-token heads use it again, after the model itself."""

    def attach(self) -> None:
        """Install the hooks."""
        for chunk in self._chunks:
            for layer in chunk.decoder.layers:
                place = layer.layer_number - 1  # global, counted from 1
                self._handles.append(layer.register_forward_hook(partial(self._block, place)))
                attention = layer.self_attention.core_attention
                attention.observer = partial(self._attention, place, attention.softmax_scale)
                self._attentions.append(attention)
            if chunk.post_process:
                self._handles.append(chunk.output_layer.register_forward_hook(self._output))

    def detach(self) -> None:
        """Take them away."""
        for handle in self._handles:
            handle.remove()
        for attention in self._attentions:
            attention.observer = None
        self._handles, self._attentions = [], []

    def during(self, forward_step: Callable[..., Any]) -> Callable[..., Any]:
        """`forward_step` (see megatron-core's schedules), with the hooks counting while it runs."""

        def watched(inputs: Iterator[Any], model: Any) -> Any:
            self._open = self._main = True
            try:
                return forward_step(inputs, model)
            finally:
                self._open = False

        return watched

    @torch.no_grad()
    def _block(self, place: int, module: Any, inputs: Any, output: tuple[torch.Tensor, Any]) -> None:
        if self._open:
            hidden, squares = output[0].detach(), getattr(module, "output_square_sum", None)
            # A fused norm behind the block has summed them already, row by row.
            total = square_sum(hidden) if squares is None else squares.sum(dtype=torch.float64)
            self._totals.add("block_output", place, total, hidden.numel())

    @torch.no_grad()
    def _attention(
        self, place: int, scale: float | None, lengths: Pair, multiplied: Pair, documents: PackedDocuments
    ) -> None:
        if not self._open:
            return
        for kind, norms in zip(("query_norm", "key_norm"), lengths, strict=True):
            self._totals.add(kind, place, norms.sum(), norms.numel())
        self._totals.add_largest(place, largest_logit(*multiplied, documents, scale))

    @torch.no_grad()
    def _output(self, module: Any, inputs: Any, output: tuple[torch.Tensor, Any]) -> None:
        if self._open and self._main:
            self._main = False
            place = self._totals.place("output")
            if isinstance(output, HeadLoss):  # the logits are gone
                columns = module.output_size_per_partition
                self._totals.add("output_logit", place, output.logit_sum, output.reported.numel() * columns)
                return
            logits = output[0].detach()
            # By rows first: a billion logits around 0 in one fp32 sum would leave little of their mean.
            total = logits.sum(dim=-1, dtype=torch.float32).sum(dtype=torch.float64)
            self._totals.add("output_logit", place, total, logits.numel())


def square_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of squares, float64[], without a copy of `tensor` in another precision."""
    norm: torch.Tensor = torch.linalg.vector_norm(tensor, dtype=torch.float32)
    return norm.double().square()
