"""The output layer that gives losses instead of logits when it is told what to predict.

Everything that hangs on the layer goes on working, since it is called all the same: weights that are gathered just in
time, factors of its input (muP), hooks that look at it, checkpoints.
"""

from dataclasses import dataclass
from typing import Any

import torch

from parallel.engine import tensor_parallel
from parallel.kernels.linear_cross_entropy import Head, HeadLoss, linear_cross_entropy


@dataclass(frozen=True)
class Targets:
    """What is to be predicted, and what it counts."""

    labels: torch.Tensor
    """int64[tokens], over the whole vocabulary; the head's `ignore_index`: nothing."""
    weights: torch.Tensor | None
    """fp32[tokens], factors of the minimised loss; None: all 1."""
    sources: torch.Tensor
    """int64[tokens]"""
    num_sources: int


class OutputLayer(tensor_parallel.ColumnParallelLinear):  # type: ignore[misc]
    """ColumnParallelLinear without a bias; see `adopt`."""

    head: Head

    @staticmethod
    def adopt(layer: Any, head: Head) -> None:
        """Make an OutputLayer of megatron-core's output layer, which GPTModel builds without asking for its class."""
        assert layer.bias is None
        assert not layer.gather_output
        layer.__class__, layer.head = OutputLayer, head

    def forward(
        self,
        input_: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
        targets: Targets | None = None,
    ) -> Any:
        """Without `targets` (logits, None), as megatron-core's; with them a `HeadLoss`.

        `input_` is [tokens, 1, hidden_size]; under sequence parallelism a piece of the tokens, `targets` are of all.
        """
        if targets is None:
            return super().forward(input_, weight, runtime_gather_output)
        loss: HeadLoss = linear_cross_entropy(
            input_.squeeze(1),
            self.weight if weight is None else weight,
            targets.labels,
            targets.weights,
            targets.sources,
            targets.num_sources,
            self.head,
        )
        return loss
