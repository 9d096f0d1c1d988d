"""Skill-It: draw more from sources that teach what the model is bad at."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import ConfigDict, Field, validate_call

from data_scheduler.policies import Feedback
from data_scheduler.policies.context import Context
from data_scheduler.policies.distribution import finite, normalized, softmax, switched_on
from data_scheduler.policies.recorded import graph_of
from headrace.errors import ConfigError

WHERE = "data.policy.options.graph"
Graph = dict[str, dict[str, float]]


class SkillIt:
    """Skill-It (Chen et al. 2023, arXiv 2307.14430), Algorithm 1: multiplicative weights over a skills graph.

        p_1(i)     ∝ w_i·exp(η·Σ_j A_ij)
        p_{t+1}(i) ∝ w_i·exp(η·Σ_{τ=t−window+1..t} Σ_j A_ij·L_j(f_τ))

    A_ij says how much training on source i lowers the held-out loss of source j; L_j(f_τ) is that loss in round τ.
    Rounds begin every `round_steps` steps, each with an evaluation of all sources that have `val_paths`. w are the
    configured weights (1 in the paper); a source of weight 0 takes no part, but its held-out loss may be a target.

    graph: A, as a path of what `headrace mix estimate-graph` wrote, or as {source: {source: weight}}, where A_ii is 1
    and others are 0 unless given. Without one each source teaches itself only.
    eta, window: η and the rounds that count; 0.5 and 3 for the paper's LEGO.
    round_steps: steps of a round. The paper has 6 rounds in 6,000 steps.
    """

    uses_feedback = True
    _graph: Graph
    _rounds: list[dict[str, float]]
    _now: dict[str, float]

    @validate_call(config=ConfigDict(strict=True, arbitrary_types_allowed=True))
    def __init__(
        self,
        initial: Mapping[str, float],
        graph: str | Graph | None = None,
        eta: Annotated[float, Field(gt=0.0)] = 0.5,
        window: Annotated[int, Field(ge=1)] = 3,
        round_steps: Annotated[int, Field(ge=1)] = 1000,
        *,
        context: Context,
    ) -> None:
        names = list(initial)
        self._names = switched_on(initial)
        self._prior = normalized({name: initial[name] for name in self._names})
        self._off = {name: 0.0 for name in initial if name not in self._prior}
        self._eta, self._window, self._round_steps = eta, window, round_steps
        if isinstance(graph, str):
            path = graph
            self._graph = _from_file(context.recall(f"graph {path}", lambda: graph_of(path, WHERE)), names, path)
        else:
            self._graph = _from_options(graph or {}, names)
        taught = [name for name in names if any(self._graph[i][name] for i in self._names)]
        missing = [] if context.held_out is None else [name for name in taught if name not in context.held_out]
        if missing:
            raise ConfigError(
                f"data.policy.kind: 'skill_it' needs held-out data; set val_paths of {', '.join(missing)}, or leave "
                "them out of the graph"
            )
        self.load_state_dict({})

    def wants_validation(self, step: int) -> bool:
        """At the beginning of every round."""
        return step % self._round_steps == 0

    def weights(self, step: int, feedback: Sequence[Feedback]) -> Mapping[str, float]:
        """p of the rounds heard of."""
        for report in feedback:
            losses = finite(report.validation_loss)
            # An evaluation between rounds (train.eval_every) is not a round.
            if losses and self.wants_validation(report.step):
                known = self._rounds[-1] if self._rounds else {}
                self._rounds = [*self._rounds[1 - self._window :], {**known, **losses}]
                if self._window == 1:
                    self._rounds = self._rounds[-1:]
                self._now = self._weigh()
        return self._now | self._off

    def _weigh(self) -> dict[str, float]:
        # Before the first round all losses count as 1.
        sums: dict[str, float] = {}
        for losses in self._rounds or [dict.fromkeys(self._graph, 1.0)]:
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0.0) + loss
        scores = {
            name: self._eta * sum(weight * sums.get(other, 0.0) for other, weight in self._graph[name].items())
            for name in self._names
        }
        return softmax(scores, self._prior)

    def state_dict(self) -> dict[str, Any]:
        """The losses of the last rounds."""
        return {"rounds": self._rounds, "now": self._now}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        self._rounds = [dict(losses) for losses in state.get("rounds", [])]
        now = state.get("now", {})
        self._now = dict(now) if set(now) == set(self._names) else self._weigh()


def _from_options(graph: Graph, names: list[str]) -> Graph:
    for name, row in graph.items():
        for other in (name, *row):
            if other not in names:
                raise ConfigError(f"{WHERE}: no source {other!r} (sources: {', '.join(names)})")
    whole = {i: {j: float(graph.get(i, {}).get(j, i == j)) for j in names} for i in names}
    if not all(weight >= 0 and math.isfinite(weight) for row in whole.values() for weight in row.values()):
        raise ConfigError(f"{WHERE}: weights are numbers from 0 on")
    return whole


def _from_file(content: Any, names: list[str], path: str) -> Graph:
    """A file's matrix by name; sources it does not know teach themselves only."""
    known, matrix = content["sources"], content["graph"]
    if not isinstance(known, list) or not isinstance(matrix, list) or len(matrix) != len(known):
        raise ConfigError(f"{WHERE}: {path}: not a square matrix over its sources")
    graph: Graph = {}
    for name, row in zip(known, matrix, strict=True):
        if not isinstance(row, list) or len(row) != len(known) or not all(type(x) in (int, float) for x in row):
            raise ConfigError(f"{WHERE}: {path}: not a square matrix of numbers over its sources")
        graph[name] = {other: float(x) for other, x in zip(known, row, strict=True)}
    if not any(name in names for name in graph):
        raise ConfigError(f"{WHERE}: {path}: of the sources {', '.join(map(str, known))} the run has none")
    inside = {name: {o: x for o, x in row.items() if o in names} for name, row in graph.items() if name in names}
    return _from_options(inside, names)
