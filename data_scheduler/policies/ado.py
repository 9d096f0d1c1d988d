"""Adaptive Data Optimization: draw from where a forecast says the loss falls fastest."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, validate_call

from data_scheduler.policies import Feedback
from data_scheduler.policies.context import Context, part_of_run
from data_scheduler.policies.distribution import finite, floored, normalized, switched_on
from data_scheduler.policies.loss_curve import LossCurve
from data_scheduler.policies.power_law import LEAST_LOSS, PowerLaw, fit

Between = Annotated[float, Field(gt=0.0, le=1.0)]
LEAST_POINTS = 8
"""Means a law is fitted to at least; it has three parameters."""
SAMPLE = 1024
"""Tokens that count as one: the samples the authors count, so that their bounds on β and α mean the same."""


class Ado:
    """ADO (Jiang et al. 2024, arXiv 2410.11820), section 3.

        L̂_k(n) = ε_k + β_k·n^(−α_k)                    per source, fitted again every `refit_every` reports  (eq. 1)
        dL̂_k/dn = −α_k·(L̂_k(n) − ε_k)/n                learning speed                                        (eq. 2)
        h(t) = γ₁·π(t) + (1 − γ₁)·h(t−1),  λ_k = h_k^s  credit: a source drawn more earned more of the gain
        ρ_k ∝ μ_k·λ_k·(−dL̂_k/dn), at least `least_share`
        π(t) = γ₂·ρ(t) + (1 − γ₂)·π̄(t−1),  π̄(t) = ρ(t)/(t+1) + (1 − 1/(t+1))·π̄(t−1)

    μ are the configured weights; a source of weight 0 takes no part. Until the first fit they hold. t counts reports
    since the run began. A source not in a report keeps its curve as it is.

    gamma1, gamma2, s, least_share (δ_min): 0.1, 0.1, 0.5, 0.01 in the paper.
    refit_every, ignore_steps: 1000 reports each, as in the authors' code, or a tenth of a shorter run. Losses of the
    first `ignore_steps` are left out of the fits, being of another regime.
    mean_of: reports that a point of a fit is the mean of, at first (`loss_curve.py`). The authors take every tenth step
    of a smoothed curve.
    count: what n is. `all`: tokens of all sources, as the authors' code, since sources teach one another; `own`: the
    source's own tokens, as the equations.
    """

    uses_feedback = True
    _heard: int
    _now: dict[str, float]
    _mean: dict[str, float]
    _credit: dict[str, float]
    _seen: dict[str, float]
    _laws: dict[str, PowerLaw]
    _curves: dict[str, LossCurve]

    @validate_call(config=ConfigDict(strict=True, arbitrary_types_allowed=True))
    def __init__(
        self,
        initial: Mapping[str, float],
        gamma1: Between = 0.1,
        gamma2: Between = 0.1,
        s: Annotated[float, Field(ge=0.0)] = 0.5,
        least_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.01,
        refit_every: Annotated[int, Field(ge=1)] | None = None,
        ignore_steps: Annotated[int, Field(ge=0)] | None = None,
        mean_of: Annotated[int, Field(ge=1)] = 10,
        count: Literal["all", "own"] = "all",
        *,
        context: Context,
    ) -> None:
        self._names = switched_on(initial)
        self._prior = normalized({name: initial[name] for name in self._names})
        self._off = {name: 0.0 for name in initial if name not in self._prior}
        self._gamma1, self._gamma2, self._s = gamma1, gamma2, s
        self._least = min(least_share, 1 / len(self._names))
        usual = part_of_run(context.run_steps, 1000)
        self._refit_every = usual if refit_every is None else refit_every
        self._ignore = usual if ignore_steps is None else ignore_steps
        self._mean_of, self._own = mean_of, count == "own"
        self.load_state_dict({})

    def weights(self, step: int, feedback: Sequence[Feedback]) -> Mapping[str, float]:
        """π after the reports heard."""
        for report in feedback:
            self._hear(report)
        return self._now | self._off

    def _hear(self, report: Feedback) -> None:
        self._heard += 1
        losses = finite(report.source_loss)
        everything = sum(report.source_tokens.values()) / SAMPLE
        self._seen = {
            name: seen + (report.source_tokens.get(name, 0) / SAMPLE if self._own else everything)
            for name, seen in self._seen.items()
        }
        if self._heard > self._ignore:
            for name, curve in self._curves.items():
                if losses.get(name, 0.0) > LEAST_LOSS and self._seen[name] > 0:
                    curve.add(self._seen[name], losses[name])
        if self._heard % self._refit_every == 0:
            self._refit()
        if self._laws:
            self._move()

    def _refit(self) -> None:
        """New laws where there is enough to fit; others keep the law they have."""
        for name, curve in self._curves.items():
            if len(curve.tokens) >= LEAST_POINTS:
                self._laws = {**self._laws, name: fit(curve.tokens, curve.losses)}

    def _move(self) -> None:
        """One step of h, ρ, π and π̄."""
        speeds = {name: -law.slope(self._seen[name]) for name, law in self._laws.items()}
        # A source without a law yet (too new, or rarely drawn) is taken to learn as fast as the mean of the others.
        mean = sum(speeds.values()) / len(speeds)
        wanted = {
            name: self._prior[name] * self._credit[name] ** self._s * speeds.get(name, mean) for name in self._names
        }
        preferred = floored(normalized(wanted) if sum(wanted.values()) > 0 else self._prior, self._least)
        turn = 1 / (self._heard + 1)
        self._now = {
            name: self._gamma2 * preferred[name] + (1 - self._gamma2) * self._mean[name] for name in self._names
        }
        self._mean = {name: turn * preferred[name] + (1 - turn) * self._mean[name] for name in self._names}
        self._credit = {
            name: self._gamma1 * self._now[name] + (1 - self._gamma1) * self._credit[name] for name in self._names
        }

    def state_dict(self) -> dict[str, Any]:
        """Curves, laws, and the recursions' last values; under 150 numbers a source."""
        return {
            "heard": self._heard,
            "now": self._now,
            "mean": self._mean,
            "credit": self._credit,
            "seen": self._seen,
            "laws": {name: list(law) for name, law in self._laws.items()},
            "curves": {name: curve.save() for name, curve in self._curves.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state; a source that is new begins with its configured share."""
        self._heard = int(state.get("heard", 0))
        self._now = self._known(state, "now")
        self._mean = self._known(state, "mean")
        self._credit = self._known(state, "credit")
        self._seen = {name: float(state.get("seen", {}).get(name, 0.0)) for name in self._names}
        laws = state.get("laws", {})
        self._laws = {name: PowerLaw(*laws[name]) for name in self._names if name in laws}
        self._curves = {name: LossCurve(self._mean_of) for name in self._names}
        for name, curve in state.get("curves", {}).items():
            if name in self._curves:
                self._curves[name].load(curve)

    def _known(self, state: dict[str, Any], key: str) -> dict[str, float]:
        """A saved distribution. Where it has all sources, exactly as saved; else completed by the configured shares."""
        saved = state.get(key, {})
        if set(saved) == set(self._names):
            return {name: float(saved[name]) for name in self._names}
        return normalized({name: float(saved.get(name, self._prior[name])) for name in self._names})
