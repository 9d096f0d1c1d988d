"""Sizes tempered: small sources get more than their size gives them, large ones less."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, validate_call

from data_scheduler.policies import Feedback
from data_scheduler.policies.context import Context
from data_scheduler.policies.distribution import switched_on


class Temperature:
    """p_i ∝ n_i^(1/τ), as in mT5 (Xue et al. 2020, arXiv 2010.11934, section 3.1, with α = 1/τ).

    Configured weights say only who takes part: a source of weight 0 does not.

    temperature: τ. 1 is `proportional`, large values approach equal shares. 10/3 is mT5's α = 0.3.
    by: what sizes are counted in, `tokens` (estimated from some 256 KB of each source) or `bytes` of text.
    """

    uses_feedback = False

    @validate_call(config=ConfigDict(strict=True, arbitrary_types_allowed=True))
    def __init__(
        self,
        initial: Mapping[str, float],
        temperature: Annotated[float, Field(gt=0.0, le=1000.0)] = 10 / 3,
        by: Literal["tokens", "bytes"] = "tokens",
        *,
        context: Context,
    ) -> None:
        sizes = {name: context.size_of(name) for name in switched_on(initial)}
        counted = {name: float(getattr(size, by)) for name, size in sizes.items()}
        most = max(counted.values())  # relative to the largest: a source of 10¹³ tokens to a power of 10 is no float
        self._weights = {name: (size / most) ** (1 / temperature) if most else 1.0 for name, size in counted.items()}

    def weights(self, step: int, feedback: Sequence[Feedback]) -> Mapping[str, float]:
        """The same every step."""
        return self._weights

    def state_dict(self) -> dict[str, Any]:
        """Nothing to save: sizes are in the journal."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""
