"""Fixed weights: the baseline of every mixture experiment."""

from collections.abc import Mapping, Sequence
from typing import Any

from data_scheduler.policies import Feedback


class Static:
    """The weights of the configuration, for the whole run."""

    uses_feedback = False

    def __init__(self, initial: Mapping[str, float]) -> None:
        self._weights = dict(initial)

    def weights(self, step: int, feedback: Sequence[Feedback]) -> Mapping[str, float]:
        """The same every step."""
        return self._weights

    def state_dict(self) -> dict[str, Any]:
        """Nothing to save."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""
