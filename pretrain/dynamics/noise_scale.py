"""The gradient-noise scale: the batch size up to which a larger batch buys fewer steps.

McCandlish et al. (arXiv 1812.06162, appendix A.1) compare the gradient of a small batch with that of a large one. Here
the small batches are the step's K micro-batches (all of them, over all data-parallel ranks) and the large one is the
global batch. With g_i the gradient of the summed loss of micro-batch i, n_i its target tokens, N = Σ n_i, G = Σ g_i / N
the step's gradient, and every token's gradient drawn with the true gradient Ḡ as mean and Σ as covariance,

    E |g_i|² = n_i² |Ḡ|² + n_i tr Σ        E |G|² = |Ḡ|² + tr Σ / N

so that both unknowns have unbiased estimates, for micro-batches of any number of tokens (equation A.2 of the paper when
all n_i are the same):

    tr Σ ≈ (Σ |g_i|² / n_i − N |G|²) / (K − 1)        |Ḡ|² ≈ |G|² − tr Σ / N        B = tr Σ / |Ḡ|²   (tokens)

Tokens of one document are not independent; what stands for tr Σ is the noise of whole micro-batches, per token.

|g_i|² costs one pass over a gradient that backward has just written: no copy, and no second backward pass. It is taken
over the blocks' weight matrices only, which every layout holds whole or in disjoint parts when a micro-batch's backward
pass ends; a part of the weights predicts the noise scale of all (arXiv 2411.00999). Under context parallelism a rank's
gradient is that of its tokens, so those of a group are added up first.

Both estimates scatter, |Ḡ|² around zero even, so B is the ratio of their moving averages, as in the paper.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from parallel import process_groups
from pretrain.dynamics.activations import square_sum
from pretrain.dynamics.totals import Totals

DECAY = 0.95
"""Of the moving averages, for each measured step: they remember about the last 20."""
MATRICES = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")


class Noise(NamedTuple):
    """One step's estimates."""

    variance: float
    """tr Σ, of one token's gradient."""
    signal: float
    """|Ḡ|²; may be below 0."""


def estimate(micro_batches: int, tokens: float, small: float, large: float) -> Noise | None:
    """The estimates from K, N, Σ |g_i|²/n_i and |G|²; None where there is nothing to compare."""
    if micro_batches < 2:
        return None
    variance = (small - tokens * large) / (micro_batches - 1)
    return Noise(variance, large - variance / tokens)


class NoiseScale:
    """The moving averages, which belong to a run's state."""

    def __init__(self) -> None:
        self.variance, self.signal = 0.0, 0.0

    def update(self, noise: Noise) -> float | None:
        """The noise scale in tokens with one more step's estimates; None while the averages give none."""
        if all(abs(value) < float("inf") for value in noise):
            # Both start from 0; how far that pulls them down is the same factor, which the ratio does not have.
            self.variance += (1 - DECAY) * (noise.variance - self.variance)
            self.signal += (1 - DECAY) * (noise.signal - self.signal)
        return self.variance / self.signal if self.signal > 0.0 < self.variance else None

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"variance": self.variance, "signal": self.signal}

    def load(self, state: dict[str, float]) -> None:
        """Go on from what a checkpoint kept."""
        self.variance, self.signal = state["variance"], state["signal"]


def is_measured(name: str) -> bool:
    """Whether a parameter belongs to the matrices that the noise is measured over."""
    return ".layers." in name and name.endswith(MATRICES)


class MicroBatchGradients:
    """Hooks that add up |g_i|²/n_i as backward passes finish a gradient."""

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        tokens: Sequence[int],
        cp_size: int,
        loss_scale: float,
        totals: Totals,
    ) -> None:
        """parameters: those that are measured; tokens: target tokens of each of this rank's micro-batches, in order;
        `loss_scale`: factor of gradients."""
        self._parameters, self._tokens, self._cp_size, self._totals = parameters, tokens, cp_size, totals
        self._factor = 1.0 / (loss_scale * loss_scale * cp_size)
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Install the hooks."""
        for parameter in self._parameters:
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._hook()))

    def detach(self) -> None:
        """Take them away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self) -> Any:
        # A model chunk's backward passes come in the order of the micro-batches, in every schedule.
        order = iter(self._tokens)

        @torch.no_grad()
        def hook(parameter: torch.Tensor) -> None:
            tokens, gradient = next(order), parameter.grad
            assert gradient is not None, "DistributedDataParallel takes a micro-batch's gradient only after this hook"
            if self._cp_size > 1:
                gradient = process_groups.sum_over_context_parallel(gradient.to(torch.float32, copy=True))
            if tokens:
                self._totals.add("noise", 0, square_sum(gradient) * (self._factor / tokens), 0)

        return hook
