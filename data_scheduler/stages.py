"""Stages: how batch shape and weights change over a run, as events with step numbers.

    data.stages ──► changes, in the unit in which stages begin ──► turns, by step ──► `stage` and `policy` events

Worked example: `seq_len: 64`, `global_batch_size: 4`, and the stages

    {from_tokens: 1000, seq_len: 128}      {from_tokens: 3000, batch_ramp: {to: 16, multiply: 2, every: 2000}}

A step of 64 · 4 = 256 tokens. After four of them 1,024 tokens were given, so stage 0 begins with step 4; each of its
steps is 512 tokens. After four of those 3,072 were given: step 8 is the first of 8 sequences, 1,024 tokens. The batch
grows again once 5,000 tokens were given, after two of these: steps 10 and later have 16 sequences. Step 10 begins at
exactly 4·256 + 4·512 + 2·1,024 = 5,120 tokens.

A resumed run goes through the same with what was really given before, so a changed list changes the future only.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from headrace.errors import ConfigError, LayoutError

if TYPE_CHECKING:
    from data_scheduler.config import DataConfig
    from data_scheduler.journal import Kind
    from data_scheduler.plan import Plan
    from data_scheduler.stage_config import BatchRamp, Stage
    from data_scheduler.timeline import Timeline

UNITS = ("from_step", "from_tokens", "from_share")
MOST_GROWTHS = 1000
"""Of one ramp. Each is an event, and what asks for tokens before a step goes through all of them."""


class Change(NamedTuple):
    """A new batch shape."""

    at: int | float
    """Where it begins, in the stages' unit."""
    stage: int
    """Number of the stage, from 0."""
    seq_len: int
    global_batch_size: int


class Turn(NamedTuple):
    """A batch shape and the steps it is for."""

    step: int
    """The first."""
    stage: int | None
    """Number of the stage, from 0; None before the first."""
    seq_len: int
    global_batch_size: int

    @property
    def data(self) -> dict[str, int]:
        """As the `stage` event has it."""
        shape = {"seq_len": self.seq_len, "global_batch_size": self.global_batch_size}
        return shape if self.stage is None else shape | {"stage": self.stage}


def turns(config: "DataConfig", run_steps: int | None, past: "Timeline", step: int = 0) -> list[Turn]:
    """The shape of `step` and every later change, ascending. `past`: shapes of the steps before it.

    Raises ConfigError when a stage begins at a share of a run whose length is not known.
    """
    found = [Turn(step, None, config.seq_len, config.global_batch_size)]
    at, given = step, tokens_before(past, step)
    for change in changes(config.seq_len, config.global_batch_size, config.stages):
        unit = config.stages[change.stage].unit
        if unit == "from_tokens":
            rate = found[-1].seq_len * found[-1].global_batch_size
            begin = at + max(0, -(-(int(change.at) - given) // rate))
            given += (begin - at) * rate
        else:
            begin = int(change.at) if unit == "from_step" else _step_of_share(change.at, run_steps)
        at = max(begin, step)
        turn = Turn(at, *change[1:])
        if at == found[-1].step:
            found[-1] = turn
        else:
            found.append(turn)
    return found


def changes(seq_len: int, global_batch_size: int, stages: Sequence["Stage"]) -> Iterator[Change]:
    """All changes of the shape a run begins with, in order: each stage's beginning, and each growth of its batch."""
    for number, stage in enumerate(stages):
        seq_len = stage.seq_len or seq_len
        sizes, every = [stage.global_batch_size or global_batch_size], 0.0
        if stage.batch_ramp is not None:
            sizes, every = _growth(global_batch_size, stage.batch_ramp), stage.batch_ramp.every
        for turn, global_batch_size in enumerate(sizes):
            yield Change(stage.begin + turn * every, number, seq_len, global_batch_size)


def batch_sizes(global_batch_size: int, stages: Sequence["Stage"]) -> list[int]:
    """Every global batch size of a run, in order."""
    return [global_batch_size, *(change.global_batch_size for change in changes(1, global_batch_size, stages))]


def longest_sequence(config: "DataConfig") -> int:
    """The largest `seq_len` of a run."""
    return max([config.seq_len, *(stage.seq_len for stage in config.stages if stage.seq_len is not None)])


def tokens_before(shape: "Timeline", step: int) -> int:
    """Tokens of the steps before `step`: `seq_len` · `global_batch_size` each, by the batch shapes of a plan."""
    begins = [begin for begin in shape.turns(step) if begin < step]
    shapes = [shape.at(begin) for begin in begins]
    return sum(
        (end - begin) * value["seq_len"] * value["global_batch_size"]
        for begin, end, value in zip(begins, [*begins[1:], step], shapes, strict=False)
    )


def weights_of(config: "DataConfig", stage: int | None, joined: Mapping[str, float] | None = None) -> dict[str, float]:
    """Every source's configured weight in a stage; None: before the first. `joined`: weights of sources that people
    added to the live run, which they keep where the stages do not name them."""
    given = [each.weights for each in config.stages[: 0 if stage is None else stage + 1] if each.weights is not None]
    if not given:
        return {source.name: source.weight for source in config.sources}
    return {source.name: given[-1].get(source.name, (joined or {}).get(source.name, 0.0)) for source in config.sources}


def policy_of(config: "DataConfig", stage: int | None) -> dict[str, Any]:
    """{"kind", "options"} of the configured policy in a stage; None: before the first."""
    given = [each.policy for each in config.stages[: 0 if stage is None else stage + 1] if each.policy is not None]
    return (given[-1] if given else config.policy).model_dump(mode="json", include={"kind", "options"})


def configured_events(
    config: "DataConfig", run_steps: int | None, plan: "Plan", step: int
) -> Iterator[tuple["Kind", int, dict[str, Any]]]:
    """(kind, step, data) of what the configuration decides from `step` on and the plan does not have.

    The plan must have nothing yet that a configuration decided for `step` and later.
    """
    ahead = turns(config, run_steps, plan.shape, step)
    known = plan.shape.at(step) == ahead[0].data
    yield from (("stage", turn.step, turn.data) for turn in (ahead[1:] if known else ahead))
    joined = {name: weight for name, (_, weight) in plan.added.items()}
    before = plan.configured(step)
    for turn in ahead:
        configured = policy_of(config, turn.stage) | {"weights": weights_of(config, turn.stage, joined)}
        if configured != before:
            yield "policy", turn.step, configured if turn.stage is None else configured | {"stage": turn.stage}
        before = configured
    limits = {source.name: source.max_epochs for source in config.sources}
    if (plan.limits.at(step) or dict.fromkeys(limits)) != limits:
        yield "limits", step, {"max_epochs": limits}


def check_layout(lanes: int, ahead: Sequence[Turn], dp_rank: int, dp_size: int) -> None:
    """Raise LayoutError unless the data-parallel size divides the lanes and every global batch size of `ahead`."""
    if not 0 <= dp_rank < dp_size:
        raise LayoutError(f"data-parallel rank {dp_rank} of {dp_size}: ranks count from 0 to size - 1")
    sizes = list(dict.fromkeys(turn.global_batch_size for turn in ahead))
    common = math.gcd(lanes, *sizes)
    if common % dp_size:
        fitting = [size for size in range(1, common + 1) if common % size == 0]
        near = sorted(fitting, key=lambda size: (abs(size - dp_size), size))[:3]
        of_all = " of every stage" if len(sizes) > 1 else ""
        batch = f" and data.global_batch_size{of_all} ({', '.join(map(str, sizes))})" if sizes else ""
        raise LayoutError(
            f"data-parallel size {dp_size} must divide data.lanes ({lanes}){batch}; nearest that do: "
            f"{', '.join(map(str, sorted(near)))}"
        )


# -- a configuration that makes sense; ValueErrors, for pydantic to name the place ------------------------------------


def check_unit(stage: "Stage") -> None:
    """Raise ValueError unless a stage says in one way where it begins, and in one how its batch changes."""
    given = [unit for unit in UNITS if getattr(stage, unit) is not None]
    if len(given) != 1:
        raise ValueError(f"a stage begins at one of {', '.join(UNITS)}; this one has {' and '.join(given) or 'none'}")
    ramp = stage.batch_ramp
    if ramp is None:
        return
    if stage.global_batch_size is not None:
        raise ValueError("give global_batch_size or batch_ramp; a ramp grows from what the batch was before")
    if (ramp.add is None) == (ramp.multiply is None):
        raise ValueError("batch_ramp: give add or multiply")
    if stage.unit != "from_share" and ramp.every != int(ramp.every):
        raise ValueError(f"batch_ramp.every: whole {stage.unit.removeprefix('from_')}s, got {ramp.every}")


def check_stages(config: "DataConfig") -> None:
    """Raise ValueError unless the stages follow each other, ramps end within them, and weights are of sources."""
    names = {source.name for source in config.sources}
    for number, stage in enumerate(config.stages):
        where, first = f"stages.{number}", config.stages[0]
        if stage.unit != first.unit:
            raise ValueError(f"{where}.{stage.unit}: all stages begin in the same unit; the first has {first.unit}")
        if stage.weights is not None:
            _check_weights(stage.weights, names, f"{where}.weights", policy_of(config, number)["kind"])
    for number, (stage, after) in enumerate(pairwise(config.stages), 1):
        if not after.begin > stage.begin:
            raise ValueError(f"stages.{number}.{after.unit}: {after.begin:g} does not come after {stage.begin:g}")
    size = config.global_batch_size
    for number, stage in enumerate(config.stages):
        if stage.batch_ramp is not None:
            end = config.stages[number + 1].begin if number + 1 < len(config.stages) else math.inf
            _check_ramp(size, stage, end, f"stages.{number}.batch_ramp")
        size = batch_sizes(size, [stage])[-1]


def _check_weights(weights: Mapping[str, float], names: set[str], where: str, policy: str) -> None:
    unknown = sorted(set(weights) - names)
    if unknown:
        raise ValueError(f"{where}: no source {unknown[0]!r} (sources: {', '.join(sorted(names))})")
    if not any(weights.values()):
        raise ValueError(f"{where}: give at least one source a positive weight")
    if policy == "schedule":
        raise ValueError(f"{where}: policy 'schedule' has mixtures of its own; give them there, or leave it out")


def _check_ramp(before: int, stage: "Stage", end: float, where: str) -> None:
    ramp = stage.batch_ramp
    assert ramp is not None
    sizes = _growth(before, ramp)
    step = f"steps of {ramp.add}" if ramp.add else f"factors of {ramp.multiply}"
    if len(sizes) > MOST_GROWTHS:
        raise ValueError(f"{where}: from {before} to {ramp.to} in {step} is more than {MOST_GROWTHS} times")
    if not sizes or sizes[-1] != ramp.to:
        near = f"; {sizes[-1]} it does" if sizes else ""
        raise ValueError(f"{where}.to: from {before} a batch does not grow to {ramp.to} in {step}{near}")
    last = stage.begin + (len(sizes) - 1) * ramp.every
    if last > end:
        raise ValueError(f"{where}: ends at {last:g}, after the next stage has begun at {end:g}")


def _growth(before: int, ramp: "BatchRamp") -> list[int]:
    """The sizes of a ramp, from the first growth on; the last is `to`, or above it where it is never met."""

    def sizes() -> Iterator[int]:
        size = before
        while size < ramp.to:
            size = size * ramp.multiply if ramp.multiply else size + (ramp.add or 1)
            yield size

    return list(islice(sizes(), MOST_GROWTHS + 1))


def _step_of_share(share: float, run_steps: int | None) -> int:
    """The first step that comes after `share` of the run, as the schedule policy counts."""
    if run_steps is None:
        raise ConfigError("stages: from_share needs the run's length, train.steps; give from_step or from_tokens")
    step = max(0, math.ceil(share * run_steps) - 1)
    return step if step / run_steps >= share else step + 1
