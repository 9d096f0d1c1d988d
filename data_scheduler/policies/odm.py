"""Online Data Mixing: a bandit that draws more from sources with high loss."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import ConfigDict, Field, validate_call

from data_scheduler.policies import Feedback
from data_scheduler.policies.context import Context
from data_scheduler.policies.distribution import finite, normalized, softmax, switched_on


class Odm:
    """ODM (Albalak et al. 2023, arXiv 2312.02406), Algorithm 1: EXP3 with the training loss as reward.

        R̂_i ← α·R̂_i + (1 − α)·L_i / π(i)                         for every source i that was drawn
        E_t = min(1/K, √(ln K / (K·t)))
        π_t(i) = (1 − K·E_t)·exp(E_{t−1}·R̂_i) / Σ_j exp(E_{t−1}·R̂_j) + E_t

    A step of ours draws all sources, where a micro-batch of the paper's draws one; each source that had tokens is one
    that was drawn. π(i) is the share the step was drawn with. t counts reports.

    alpha: weight of the past in R̂; 0.9 in the paper.
    warmup_steps: reports heard before the weights leave the configured ones; 1 % of the run when not given, as in the
    paper, and 0 where the run's length is not known. Sources with a configured weight of 0 take no part.
    """

    uses_feedback = True
    _rewards: dict[str, float]
    _heard: int
    _now: Mapping[str, float]

    @validate_call(config=ConfigDict(strict=True, arbitrary_types_allowed=True))
    def __init__(
        self,
        initial: Mapping[str, float],
        alpha: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9,
        warmup_steps: Annotated[int, Field(ge=0)] | None = None,
        *,
        context: Context,
    ) -> None:
        self._initial, self._alpha = normalized(initial), alpha
        self._warmup = (context.run_steps or 0) // 100 if warmup_steps is None else warmup_steps
        self._names = switched_on(initial)
        self.load_state_dict({})

    def weights(self, step: int, feedback: Sequence[Feedback]) -> Mapping[str, float]:
        """π_t, with t one more than the reports heard."""
        for report in feedback:
            self._heard += 1
            for name, loss in finite(report.source_loss).items():
                share = report.shares.get(name, self._now.get(name, 0.0))
                if name in self._rewards and share > 0:
                    self._rewards[name] = self._alpha * self._rewards[name] + (1 - self._alpha) * loss / share
        self._now = self._shares() if self._heard >= self._warmup else self._initial
        return self._now

    def _shares(self) -> dict[str, float]:
        exploring, before = self._exploration(self._heard + 1), self._exploration(self._heard)
        exploited = softmax({name: before * reward for name, reward in self._rewards.items()})
        scale = 1 - len(self._names) * exploring
        # 1 − K/K is −1e-16 for some K.
        return {name: max(scale, 0.0) * share + exploring for name, share in exploited.items()}

    def _exploration(self, turn: int) -> float:
        """E_t."""
        sources = len(self._names)
        return min(1 / sources, math.sqrt(math.log(sources) / (sources * turn))) if turn else 1 / sources

    def state_dict(self) -> dict[str, Any]:
        """R̂, the number of reports, and the shares answered last."""
        return {"rewards": dict(self._rewards), "heard": self._heard, "now": dict(self._now)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state; sources that are new begin with no reward."""
        rewards = state.get("rewards", {})
        self._rewards = {name: float(rewards.get(name, 0.0)) for name in self._names}
        self._heard = int(state.get("heard", 0))
        self._now = dict(state.get("now", self._initial))
