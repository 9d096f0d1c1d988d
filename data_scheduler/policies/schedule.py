"""Weights that change at given steps: the staged mixtures of YuLan, Qwen2.5 and Falcon2 in their simplest form."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from data_scheduler.policies import Feedback
from headrace.errors import ConfigError


class Schedule:
    """Piecewise constant weights: `stages` is a list of `{from_step: N, weights: {source: weight}}`.

    Before the first stage the configured weights hold.
    """

    uses_feedback = False

    def __init__(self, initial: Mapping[str, float], stages: list[dict[str, Any]]) -> None:
        parsed: list[tuple[int, dict[str, float]]] = [(0, dict(initial))]
        for number, stage in enumerate(stages):
            where = f"data.policy.options.stages.{number}"
            if not isinstance(stage, dict) or set(stage) != {"from_step", "weights"}:
                raise ConfigError(f"{where}: a stage has exactly the keys from_step and weights")
            step, weights = stage["from_step"], stage["weights"]
            if not isinstance(step, int) or isinstance(step, bool) or step < 0:
                raise ConfigError(f"{where}.from_step: a step from 0 on, got {step!r}")
            if parsed[1:] and step <= parsed[-1][0]:
                raise ConfigError(f"{where}.from_step: {step} does not come after {parsed[-1][0]}")
            if not isinstance(weights, dict):
                raise ConfigError(f"{where}.weights: a mapping from source to weight")
            unknown = sorted(set(weights) - set(initial))
            if unknown:
                raise ConfigError(f"{where}.weights: no source {unknown[0]!r} (sources: {', '.join(initial)})")
            if not all(isinstance(value, int | float) and value >= 0 for value in weights.values()):
                raise ConfigError(f"{where}.weights: weights are numbers from 0 on")
            parsed.append((step, {name: float(value) for name, value in weights.items()}))
        self._steps = [step for step, _ in parsed]
        self._weights = [weights for _, weights in parsed]

    def weights(self, step: int, feedback: Sequence[Feedback]) -> Mapping[str, float]:
        """The weights of the last stage that began at or before `step`."""
        return self._weights[bisect_right(self._steps, step) - 1]

    def state_dict(self) -> dict[str, Any]:
        """Nothing to save: the step says it all."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""
