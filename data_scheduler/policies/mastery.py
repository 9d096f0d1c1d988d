"""Spend less on what the model has learned: a source's share goes down once its loss has flattened."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import ConfigDict, Field, validate_call

from data_scheduler.policies import Feedback
from data_scheduler.policies.context import Context, part_of_run
from data_scheduler.policies.distribution import finite, floored, normalized, switched_on
from data_scheduler.policies.loss_curve import LossCurve
from data_scheduler.policies.power_law import LEAST_LOSS, PowerLaw, fit
from headrace.errors import ConfigError

LEAST_POINTS = 8
"""Means a law is fitted to at least; it has three parameters."""
MOST_EXPONENT = 1.0
"""Of a fitted law; larger ones take the noise of a few points for a floor."""
SMOOTHING = 0.05
"""Weight of a report in the smoothed loss: a mean over some twenty."""


class Mastery:
    """Nyonic (arXiv 2404.15702), section 2.2: ratios follow the training loss, and no tokens are spent on what is
    mastered. The report gives no equations; these are ours:

        L̂_k(n) = ε_k + β_k·n^(−α_k)      fitted to the source's loss over its own tokens, every `refit_every` reports
        s_k ← 0.95·s_k + 0.05·L_k         smoothed loss, per report
        mastered when s_k ≤ (1 + at)·L̂_k(ahead·n_k), until s_k > (1 + until)·L̂_k(ahead·n_k)
        share ∝ w_k, times `keep` while mastered, at least `least_share`

    The floor that counts is the forecast for `ahead` times the source's tokens, not ε: a flat curve can be fitted with
    a low ε and a small α as well as with a high ε, but what either forecasts for twice the tokens is the same.

    w are the configured weights; a source of weight 0 takes no part. The gap between `at` and `until` keeps a source
    from flickering between the two.

    at, until: relative distance to that forecast at which a source becomes mastered, and ceases to be.
    ahead: how far ahead the forecast is, as a multiple of the tokens so far.
    keep: what a mastered source keeps of its weight.
    refit_every, ignore_steps: reports between fits, and reports at the beginning whose losses are left out of them; 500
    each, or a tenth of a shorter run.
    mean_of: reports that a point of a fit is the mean of, at first (`loss_curve.py`).
    """

    uses_feedback = True
    _heard: int
    _seen: dict[str, int]
    _smoothed: dict[str, float]
    _mastered: list[str]
    _laws: dict[str, PowerLaw]
    _curves: dict[str, LossCurve]

    @validate_call(config=ConfigDict(strict=True, arbitrary_types_allowed=True))
    def __init__(
        self,
        initial: Mapping[str, float],
        at: Annotated[float, Field(ge=0.0)] = 0.01,
        until: Annotated[float, Field(gt=0.0)] = 0.03,
        ahead: Annotated[float, Field(gt=1.0)] = 2.0,
        keep: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.25,
        least_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.01,
        refit_every: Annotated[int, Field(ge=1)] | None = None,
        ignore_steps: Annotated[int, Field(ge=0)] | None = None,
        mean_of: Annotated[int, Field(ge=1)] = 5,
        *,
        context: Context,
    ) -> None:
        if until <= at:
            raise ConfigError(f"data.policy.options of 'mastery': until ({until}) must be larger than at ({at})")
        self._names = switched_on(initial)
        self._prior = normalized({name: initial[name] for name in self._names})
        self._off = {name: 0.0 for name in initial if name not in self._prior}
        self._at, self._until, self._ahead, self._keep = at, until, ahead, keep
        self._least = min(least_share, 1 / len(self._names))
        usual = part_of_run(context.run_steps, 500)
        self._refit_every = usual if refit_every is None else refit_every
        self._ignore = usual if ignore_steps is None else ignore_steps
        self._mean_of = mean_of
        self.load_state_dict({})

    def weights(self, step: int, feedback: Sequence[Feedback]) -> Mapping[str, float]:
        """The configured shares, with those of mastered sources lowered."""
        for report in feedback:
            self._hear(report)
        # With all mastered nothing is to be gained by moving shares.
        if not self._mastered or len(self._mastered) == len(self._names):
            return self._prior | self._off
        kept = {name: share * (self._keep if name in self._mastered else 1.0) for name, share in self._prior.items()}
        return floored(normalized(kept), self._least) | self._off

    def _hear(self, report: Feedback) -> None:
        self._heard += 1
        self._seen, self._smoothed = dict(self._seen), dict(self._smoothed)  # what was saved stays as it was
        for name, loss in finite(report.source_loss).items():
            tokens = report.source_tokens.get(name, 0)
            if name not in self._curves or tokens <= 0 or loss <= LEAST_LOSS:
                continue
            self._seen[name] += tokens
            before = self._smoothed.get(name, loss)
            self._smoothed[name] = (1 - SMOOTHING) * before + SMOOTHING * loss
            if self._heard > self._ignore:
                self._curves[name].add(self._seen[name], loss)
        if self._heard % self._refit_every == 0:
            for name, curve in self._curves.items():
                if len(curve.tokens) >= LEAST_POINTS:
                    self._laws = {**self._laws, name: fit(curve.tokens, curve.losses, MOST_EXPONENT)}
        self._mastered = [name for name in self._names if self._is_mastered(name)]

    def _is_mastered(self, name: str) -> bool:
        law, loss = self._laws.get(name), self._smoothed.get(name)
        if law is None or loss is None:
            return False
        floor = law.at(self._ahead * self._seen[name])
        return loss <= floor * (1 + (self._until if name in self._mastered else self._at))

    def state_dict(self) -> dict[str, Any]:
        """Curves, laws, smoothed losses, and who is mastered."""
        return {
            "heard": self._heard,
            "seen": self._seen,
            "smoothed": self._smoothed,
            "mastered": self._mastered,
            "laws": {name: list(law) for name, law in self._laws.items()},
            "curves": {name: curve.save() for name, curve in self._curves.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state; a source that is new begins without a curve."""
        self._heard = int(state.get("heard", 0))
        self._seen = {name: int(state.get("seen", {}).get(name, 0)) for name in self._names}
        self._smoothed = {name: loss for name, loss in state.get("smoothed", {}).items() if name in self._seen}
        self._mastered = [name for name in state.get("mastered", []) if name in self._seen]
        self._laws = {name: PowerLaw(*law) for name, law in state.get("laws", {}).items() if name in self._seen}
        self._curves = {name: LossCurve(self._mean_of) for name in self._names}
        for name, curve in state.get("curves", {}).items():
            if name in self._curves:
                self._curves[name].load(curve)
