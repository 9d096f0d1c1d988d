"""Aioli: measure in the run itself how each source moves every source's loss, and follow that."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import ConfigDict, Field, validate_call

from data_scheduler.order import permutation
from data_scheduler.policies import Feedback
from data_scheduler.policies.context import Context
from data_scheduler.policies.distribution import finite, normalized, softmax, switched_on
from headrace.errors import ConfigError

Matrix = dict[str, dict[str, float]]
DRAWN_AS_ASKED = 1e-3
"""Largest difference of a turn's shares to those asked for; guard-rails that allow less change too little to matter."""


class Aioli:
    """Aioli (Chen et al. 2024, arXiv 2411.05735), Algorithms 1 and 2: the linear dynamic mixing law
    L_i(t+1) = L_i(t) − Σ_j A_ij·p_j, with A estimated online.

    A round of `round_steps` steps begins with sweeps: `sweeps` times, in a random order, each source has its turn of
    `turn_steps` steps with the mixture that gives it the share `own_share`, the others equal parts of the rest. The
    drop of every held-out loss i over the turns of source j, averaged over sweeps, is β_ij. With W the matrix of these
    mixtures:

        β_i = W·A_i  solved for A_i;      A ← (A − min(A, 0)) / Σ A,  smoothed over rounds: Ā ← (1 − ema)·A + ema·Ā
        p_j ∝ w_j·exp(η·Σ_i Ā_ij)         with w the configured shares

    and p is drawn for the rest of the round, beginning `horizon` steps after the last turn. As in the authors' code, an
    update starts from w where `ema` smooths, and from the last p with `ema` null (the paper's equation). Held-out
    losses are measured at both ends of every turn. A round in which one is missing, or a turn was drawn with other
    shares (guard-rails, people), changes nothing. A source of weight 0 takes no part.

    eta, turn_steps, sweeps, round_steps, own_share, ema: 0.2, 4, 4, 250, 0.75, 0.1, as in the authors' instructions
    (they try η from 0.1 to 0.5, and 2 sweeps with turns of 10 steps for seven sources).
    """

    uses_feedback = True
    _now: dict[str, float]
    _law: Matrix
    _losses: list[dict[str, float]]

    @validate_call(config=ConfigDict(strict=True, arbitrary_types_allowed=True))
    def __init__(
        self,
        initial: Mapping[str, float],
        eta: Annotated[float, Field(gt=0.0)] = 0.2,
        turn_steps: Annotated[int, Field(ge=1)] = 4,
        sweeps: Annotated[int, Field(ge=1)] = 4,
        round_steps: Annotated[int, Field(ge=2)] = 250,
        own_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.75,
        ema: Annotated[float, Field(ge=0.0, lt=1.0)] | None = 0.1,
        *,
        context: Context,
    ) -> None:
        self._names = switched_on(initial)
        self._prior = normalized({name: initial[name] for name in self._names})
        self._off = {name: 0.0 for name in initial if name not in self._prior}
        self._eta, self._own, self._ema, self._seed = eta, own_share, ema, context.seed
        self._turn_steps, self._sweeps, self._round_steps = turn_steps, sweeps, round_steps
        count = len(self._names)
        self._turns = sweeps * count
        needed = self._turns * turn_steps + context.horizon
        if needed >= round_steps:
            raise ConfigError(
                f"data.policy.options of 'aioli': round_steps ({round_steps}) must be larger than {needed}: {sweeps} "
                f"sweeps of {count} turns of {turn_steps} steps, and a horizon of {context.horizon}"
            )
        if count > 1 and own_share * count <= 1:
            raise ConfigError(
                f"data.policy.options of 'aioli': own_share ({own_share}) must be above 1/{count}, or a turn would not "
                "favour its source"
            )
        missing = [] if context.held_out is None else [n for n in self._names if n not in context.held_out]
        if missing:
            raise ConfigError(f"data.policy.kind: 'aioli' needs held-out data; set val_paths of {', '.join(missing)}")
        self.load_state_dict({})

    def wants_validation(self, step: int) -> bool:
        """At both ends of every turn."""
        place = step % self._round_steps
        return place <= self._turns * self._turn_steps and place % self._turn_steps == 0

    def weights(self, step: int, feedback: Sequence[Feedback]) -> Mapping[str, float]:
        """The mixture of the turn, or p between sweeps."""
        for report in feedback:
            self._hear(report)
        number, place = divmod(step, self._round_steps)
        turn = place // self._turn_steps
        if turn >= self._turns:
            return self._now | self._off
        return self._mixture(self._turn_of(number, turn)) | self._off

    def _hear(self, report: Feedback) -> None:
        number, place = divmod(report.step, self._round_steps)
        if place == 0:
            self._losses = []
        if self.wants_validation(report.step):
            self._hear_losses(report, number, place)
        turn = place // self._turn_steps
        if turn < self._turns and report.shares:
            asked = self._mixture(self._turn_of(number, turn))
            if any(abs(report.shares.get(name, 0.0) - share) > DRAWN_AS_ASKED for name, share in asked.items()):
                self._losses = []  # a guard-rail or a person saw to another mixture: no later ones count in this round

    def _hear_losses(self, report: Feedback, number: int, place: int) -> None:
        """Keep the losses at an end of a turn; after the last, update p."""
        losses = finite(report.validation_loss)
        if len(self._losses) * self._turn_steps != place or not losses.keys() >= set(self._names):
            return  # one is missing, so all later ones of the round are left out
        self._losses = [*self._losses, {name: losses[name] for name in self._names}]
        if len(self._losses) == self._turns + 1:
            self._update(number)

    def _update(self, number: int) -> None:
        """A new p from the losses at the ends of the round's turns."""
        drops: Matrix = {i: dict.fromkeys(self._names, 0.0) for i in self._names}
        for turn in range(self._turns):
            source = self._turn_of(number, turn)
            for i in self._names:
                drops[i][source] += (self._losses[turn][i] - self._losses[turn + 1][i]) / self._sweeps
        law = _scaled({i: self._solve(row) for i, row in drops.items()})
        if self._ema is not None:
            if self._law:
                old = self._law
                law = {
                    i: {j: (1 - self._ema) * x + self._ema * old[i][j] for j, x in r.items()} for i, r in law.items()
                }
            self._law = law
        scores = {j: self._eta * sum(law[i][j] for i in self._names) for j in self._names}
        self._now = softmax(scores, self._prior if self._ema is not None else self._now)

    def _solve(self, drops: dict[str, float]) -> dict[str, float]:
        """A_i from β_i = W·A_i. W = (a − b)·1 + b·J has the inverse below, as its rows sum to 1."""
        if len(self._names) == 1:
            return drops
        rest = (1 - self._own) / (len(self._names) - 1)
        total = sum(drops.values())
        return {name: (drop - rest * total) / (self._own - rest) for name, drop in drops.items()}

    def _mixture(self, source: str) -> dict[str, float]:
        if len(self._names) == 1:
            return {source: 1.0}
        rest = (1 - self._own) / (len(self._names) - 1)
        return {name: self._own if name == source else rest for name in self._names}

    def _turn_of(self, number: int, turn: int) -> str:
        """The source whose turn it is; every sweep has its own order."""
        sweep, place = divmod(turn, len(self._names))
        return self._names[int(permutation(len(self._names), "aioli", self._seed, number, sweep)[place])]

    def state_dict(self) -> dict[str, Any]:
        """p, Ā, and the round's losses so far."""
        return {"now": self._now, "law": self._law, "losses": self._losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state; with other sources than before p and Ā begin anew."""
        now = state.get("now", {})
        same = set(now) == set(self._names)
        self._now = {name: float(now[name]) for name in self._names} if same else dict(self._prior)
        self._law = {i: dict(row) for i, row in state["law"].items()} if same else {}
        self._losses = [dict(losses) for losses in state["losses"]] if same else []


def _scaled(matrix: Matrix) -> Matrix:
    """A without negative entries, summing to 1; zeros when nothing changed."""
    least = min(min(row.values()) for row in matrix.values())
    shifted = {i: {j: x - min(least, 0.0) for j, x in row.items()} for i, row in matrix.items()}
    total = sum(sum(row.values()) for row in shifted.values())
    return {i: {j: x / total if total > 0 else 0.0 for j, x in row.items()} for i, row in shifted.items()}
