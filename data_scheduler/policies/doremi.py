"""DoReMi: draw more from sources where the model is furthest behind a reference."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import ConfigDict, Field, validate_call

from data_scheduler.policies import Feedback
from data_scheduler.policies.context import Context
from data_scheduler.policies.distribution import finite, normalized, switched_on
from data_scheduler.policies.recorded import final_losses

WHERE = "data.policy.options.reference"


class DoReMi:
    """DoReMi (Xie et al. 2023, arXiv 2305.10429), Algorithm 1: Group DRO on the excess loss over a reference.

        λ_t[i] = max(ℓ_i − ℓ_ref,i, 0)
        α'_t = α_{t−1}·exp(η·λ_t),   α_t = (1 − c)·α'_t / Σ α'_t + c·u

    u is uniform, α_0 the configured shares (the paper's are uniform, as ours by default). Two differences. The
    paper clips at 0 token by token, with a reference model at hand; here means of a source are compared, with
    losses the reference run recorded: what it reached, over its last reports. And the paper's proxy model is
    trained by weighting losses; here the weights are what is drawn. A source not in a report counts with its last
    λ, as in the authors' code. The paper trains its large model with the mean of α_t over the run; `headrace data
    ledger` prints it as the share asked.

    reference: another run's folder, or its metrics.jsonl. Read once, when the run begins; its losses go to the journal.
    eta, smoothing: η and c; 1 and 10⁻³ in the paper.
    last: reports of the reference run, per source, that its loss is the mean of, by tokens.
    """

    uses_feedback = True
    _now: dict[str, float]
    _excess: dict[str, float]

    @validate_call(config=ConfigDict(strict=True, arbitrary_types_allowed=True))
    def __init__(
        self,
        initial: Mapping[str, float],
        reference: str,
        eta: Annotated[float, Field(gt=0.0)] = 1.0,
        smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 1e-3,
        last: Annotated[int, Field(ge=1)] = 100,
        *,
        context: Context,
    ) -> None:
        self._names = switched_on(initial)
        self._prior = normalized({name: initial[name] for name in self._names})
        self._off = {name: 0.0 for name in initial if name not in self._prior}
        self._eta, self._smoothing = eta, smoothing
        question = f"losses of {reference}, last {last}: {', '.join(self._names)}"
        found = context.recall(question, lambda: final_losses(reference, self._names, last, WHERE))
        self._reference = {name: float(found[name]) for name in self._names}
        self.load_state_dict({})

    def weights(self, step: int, feedback: Sequence[Feedback]) -> Mapping[str, float]:
        """α after the reports heard."""
        for report in feedback:
            losses = finite(report.source_loss)
            self._excess = {
                name: max(losses[name] - self._reference[name], 0.0) if name in losses else excess
                for name, excess in self._excess.items()
            }
            most = max(self._excess.values())  # cancels in the quotient; keeps exp below 1
            raised = {
                name: share * math.exp(self._eta * (self._excess[name] - most)) for name, share in self._now.items()
            }
            uniform = self._smoothing / len(self._names)
            # Without smoothing a share could fall to 0 and never rise again; the least float is as good as none.
            total = max(sum(raised.values()), 5e-324)
            self._now = {
                name: (1 - self._smoothing) * max(weight / total, 1e-300) + uniform for name, weight in raised.items()
            }
        return self._now | self._off

    def state_dict(self) -> dict[str, Any]:
        """α and the last λ."""
        return {"now": self._now, "excess": self._excess}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state; a source that is new begins with its configured share."""
        now, excess = state.get("now", {}), state.get("excess", {})
        self._now = {name: float(now.get(name, self._prior[name])) for name in self._names}
        self._excess = {name: float(excess.get(name, 0.0)) for name in self._names}
