"""A mixing policy in forty lines: draw from where the loss falls fastest.

The idea is "learning progress" (Graves et al. 2017, arXiv 1704.03003): what is mastered and what is out of reach have
in common that nothing is gained on them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from data_scheduler import Feedback
from headrace.errors import ConfigError

FAST, SLOW = 0.1, 0.01
"""Weights of a report in the two running means of a loss: over some ten and some hundred reports."""


class LearningProgress:
    """weight_i = w_i · (floor + max(0, slow_i − fast_i) / slow_i), with w_i the configured weight.

    floor: what a source that makes no progress counts with.
    """

    uses_feedback = True  # planning waits for the reports of `data.policy.horizon` steps ago

    def __init__(self, initial: Mapping[str, float], floor: float = 0.02) -> None:
        if not 0 < floor <= 1:
            raise ConfigError(f"data.policy.options.floor: above 0 and at most 1, got {floor}")
        self.initial, self.floor = dict(initial), floor
        self.means: dict[str, list[float]] = {}

    def weights(self, step: int, feedback: Sequence[Feedback]) -> Mapping[str, float]:
        for report in feedback:
            for name, loss in report.source_loss.items():  # only sources that had tokens in that step
                if math.isfinite(loss):
                    fast, slow = self.means.get(name, (loss, loss))
                    self.means[name] = [fast + FAST * (loss - fast), slow + SLOW * (loss - slow)]
        return {name: weight * (self.floor + self.progress(name)) for name, weight in self.initial.items()}

    def progress(self, name: str) -> float:
        fast, slow = self.means.get(name, (1.0, 1.0))
        return max(0.0, slow - fast) / slow if slow > 0 else 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"means": dict(self.means)}  # plain data; its lists are replaced, never changed

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.means = dict(state.get("means", {}))  # {} is the state of a run that has not begun
