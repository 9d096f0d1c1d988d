"""Mixtures that follow a plan: the stages of YuLan, Qwen2.5 and Falcon2, with steps or slopes between them."""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import ConfigDict, validate_call

from data_scheduler.policies import Feedback
from data_scheduler.policies.context import Context
from data_scheduler.policies.distribution import normalized
from headrace.errors import ConfigError

UNITS = ("from_step", "from_tokens", "from_share")
Shape = Literal["constant", "linear", "cosine"]
Weights = dict[str, float]


class Schedule:
    """Stages, each with a beginning and a mixture; between the beginnings of two stages the shares go

        constant   as the first                                          (Qwen2.5, arXiv 2412.15115)
        linear     from the first to the second in a straight line       (YuLan, arXiv 2406.19853)
        cosine     likewise, by (1 − cos πx)/2: slow at both ends

    Before the first stage the configured weights hold, as a stage from 0 on would.

    stages: list of {from_step | from_tokens | from_share: N, mixture: NAME | weights: {source: weight}, shape: SHAPE}.
    One unit for all. Tokens are those of the steps before, `seq_len` · `global_batch_size` each; a share is one of
    `train.steps`, 0 to 1. `shape`, where given, is how this stage goes over into the next.
    mixtures: {name: {source: weight}}, to be named in stages; sources left out get nothing.
    shape: of stages that do not say; `constant`.
    """

    uses_feedback = False

    @validate_call(config=ConfigDict(strict=True, arbitrary_types_allowed=True))
    def __init__(
        self,
        initial: Mapping[str, float],
        stages: list[dict[str, Any]],
        mixtures: dict[str, dict[str, float]] | None = None,
        shape: Shape = "constant",
        *,
        context: Context,
    ) -> None:
        self._context = context
        self._sources = list(initial)
        named = {
            name: self._mixture(weights, f"data.policy.options.mixtures.{name}")
            for name, weights in (mixtures or {}).items()
        }
        self._begins: list[float] = [0.0]
        self._mixtures: list[Weights] = [normalized(initial)]
        self._shapes: list[str] = [shape]
        self._unit = "from_step"
        for number, stage in enumerate(stages):
            where = f"data.policy.options.stages.{number}"
            begin = self._begin(stage, where, first=number == 0)
            self._begins.append(begin)
            self._mixtures.append(self._of_stage(stage, named, where))
            self._shapes.append(self._shape(stage, shape, where))
        if self._unit == "from_share" and context.run_steps is None:
            raise ConfigError("data.policy.options.stages: from_share needs train.steps; give from_step or from_tokens")

    def weights(self, step: int, feedback: Sequence[Feedback]) -> Mapping[str, float]:
        """The mixture at `step`."""
        at = self._at(step)
        number = bisect_right(self._begins, at) - 1
        mixture, shape = self._mixtures[number], self._shapes[number]
        if shape == "constant" or number + 1 == len(self._begins):
            return mixture
        begin, end = self._begins[number], self._begins[number + 1]
        way = (at - begin) / (end - begin)
        if shape == "cosine":
            way = (1 - math.cos(math.pi * way)) / 2
        following = self._mixtures[number + 1]
        return {name: (1 - way) * mixture[name] + way * following[name] for name in self._sources}

    def _at(self, step: int) -> float:
        """`step` in the schedule's unit."""
        if self._unit == "from_tokens":
            return self._context.tokens_before(step)
        if self._unit == "from_share":
            return step / (self._context.run_steps or 1)
        return step

    def _begin(self, stage: dict[str, Any], where: str, *, first: bool) -> float:
        units = [unit for unit in UNITS if unit in stage]
        known = {*UNITS, "mixture", "weights", "shape"}
        strange = sorted(set(stage) - known)
        if strange or len(units) != 1 or ("mixture" in stage) == ("weights" in stage):
            said = f"no key {strange[0]!r}; " if strange else ""
            raise ConfigError(f"{where}: {said}a stage has one of {', '.join(UNITS)}, and either mixture or weights")
        unit, value = units[0], stage[units[0]]
        if first:
            self._unit = unit
        if unit != self._unit:
            raise ConfigError(f"{where}.{unit}: all stages begin in the same unit; the first has {self._unit}")
        whole = unit != "from_share"
        good = type(value) is int or (not whole and type(value) is float)
        if not good or not value >= 0 or (not whole and value > 1):
            wanted = "a share of the run, 0 to 1" if not whole else f"a {unit.removeprefix('from_')} number from 0 on"
            raise ConfigError(f"{where}.{unit}: {wanted}, got {value!r}")
        if not first and value <= self._begins[-1]:
            raise ConfigError(f"{where}.{unit}: {value} does not come after {self._begins[-1]:g}")
        return float(value)

    def _of_stage(self, stage: dict[str, Any], named: dict[str, Weights], where: str) -> Weights:
        if "weights" in stage:
            return self._mixture(stage["weights"], f"{where}.weights")
        name = stage["mixture"]
        if not isinstance(name, str) or name not in named:
            known = ", ".join(named) or "none given under mixtures"
            raise ConfigError(f"{where}.mixture: no mixture {name!r} (known: {known})")
        return named[name]

    def _shape(self, stage: dict[str, Any], default: str, where: str) -> str:
        shape = stage.get("shape", default)
        if shape not in ("constant", "linear", "cosine"):
            raise ConfigError(f"{where}.shape: constant, linear or cosine, got {shape!r}")
        return str(shape)

    def _mixture(self, weights: Any, where: str) -> Weights:
        """Shares of all sources. Raises ConfigError for unknown sources and weights that cannot be used."""
        if not isinstance(weights, dict):
            raise ConfigError(f"{where}: a mapping from source to weight")
        unknown = sorted(str(name) for name in set(weights) - set(self._sources))
        if unknown:
            raise ConfigError(f"{where}: no source {unknown[0]!r} (sources: {', '.join(self._sources)})")
        values = {name: weights.get(name, 0.0) for name in self._sources}
        if not all(type(value) in (int, float) and 0 <= value < math.inf for value in values.values()):
            raise ConfigError(f"{where}: weights are numbers from 0 on")
        if not any(values.values()):
            raise ConfigError(f"{where}: give at least one source a positive weight")
        return normalized({name: float(value) for name, value in values.items()})

    def state_dict(self) -> dict[str, Any]:
        """Nothing to save: the step says it all."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""
