"""Each source by its size: every document equally likely, the baseline that data "as it is" means."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import ConfigDict, validate_call

from data_scheduler.policies import Feedback
from data_scheduler.policies.context import Context
from data_scheduler.policies.distribution import switched_on


class Proportional:
    """w_i = n_i, with n_i the size of source i.

    Configured weights say only who takes part: a source of weight 0 does not.

    by: what sizes are counted in, `tokens` (estimated from some 256 KB of each source) or `bytes` of text.
    """

    uses_feedback = False

    @validate_call(config=ConfigDict(strict=True, arbitrary_types_allowed=True))
    def __init__(
        self, initial: Mapping[str, float], by: Literal["tokens", "bytes"] = "tokens", *, context: Context
    ) -> None:
        sizes = {name: context.size_of(name) for name in switched_on(initial)}
        self._sizes = {name: float(getattr(size, by)) for name, size in sizes.items()}

    def weights(self, step: int, feedback: Sequence[Feedback]) -> Mapping[str, float]:
        """The same every step."""
        return self._sizes

    def state_dict(self) -> dict[str, Any]:
        """Nothing to save: sizes are in the journal."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""
