"""The learning rate of every step: a pure function, so that resuming needs no scheduler state.

A schedule covers a segment of the run: all of it, or from a stage that has a `learning_rate` to the next one that has.
Within a segment it depends on how many steps (or tokens) of the segment are done with the update, and how many it has:

    optimizer: {lr: 1.0, min_lr: 0.1, schedule: linear}                train.steps: 8
    stages: [{from_step: 4, learning_rate: {lr: 0.6, min_lr: 0.0, warmup_steps: 2}}]

    step          0      1     2      3    | 4     5    6    7
    done          1      2     3      4    | 1     2    3    4      of 4 each
    learning rate 0.775  0.55  0.325  0.1  | 0.35  0.6  0.3  0.0

The warm-up of the second goes from 0.1, the rate before it, to its peak: no step is forgotten and none jumps.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from data_scheduler.stages import tokens_before
from data_scheduler.timeline import Timeline
from pretrain.config import RunConfig
from pretrain.config.learning_rate import LearningRateConfig
from pretrain.stages import schedule_began_with, schedule_of


class Segment(NamedTuple):
    """Steps with one schedule."""

    schedule: LearningRateConfig
    begin: int
    """The first."""
    end: int
    """The one after the last."""


def learning_rate(config: RunConfig, shape: Timeline, step: int) -> float:
    """Learning rate of `step`, without any `lr_scale`; `shape` has the batch shapes of the run, as journaled."""
    segment = segment_at(config, shape, step)
    if segment.schedule.in_tokens:
        begin = tokens_before(shape, segment.begin)
        done, length = tokens_before(shape, step + 1) - begin, tokens_before(shape, segment.end) - begin
    else:
        done, length = step + 1 - segment.begin, segment.end - segment.begin
    before = (
        learning_rate(config, shape, segment.begin - 1) if done < segment.schedule.warmup and segment.begin else 0.0
    )
    return rate(done, segment.schedule, length, before)


def segment_at(config: RunConfig, shape: Timeline, step: int) -> Segment:
    """The segment that `step` is in: its stretch of steps whose stages have the same schedule."""
    steps = config.train.steps

    def number(turn: int) -> int | None:
        return schedule_began_with(config, shape.at(turn).get("stage"))

    own, begin = number(step), step
    for turn in reversed(shape.turns(step + 1)):
        if number(turn) != own:
            break
        begin = turn
    after = (turn for turn in shape.turns(steps) if turn > step and number(turn) != own)
    return Segment(schedule_of(config, shape.at(step).get("stage")), begin, next(after, max(steps, step + 1)))


def rate(done: int, config: LearningRateConfig, length: int, before: float = 0.0) -> float:
    """Learning rate of the update with which `done` of a segment's `length` steps (or tokens) are done.

    Warm-up goes in a straight line from `before` and reaches the peak once `warmup` are done. Then `cosine`
    (arXiv 1608.03983, without restarts) and `linear` fall to min_lr when `decay` are done, `wsd` (MiniCPM,
    arXiv 2404.06395) holds the peak and falls over the last `decay`, by `decay_shape` (`1-sqrt`: arXiv 2405.18392,
    equation 2), `inverse_sqrt` falls as √(warmup / done) (arXiv 1706.03762, equation 3), never below min_lr, and over
    the last `decay` to min_lr (arXiv 2106.04560, section 3.5), `constant` holds.
    """
    peak, least, warmup = config.lr, config.min_lr, config.warmup
    if done < warmup:
        return before + (peak - before) * done / warmup
    if config.schedule == "constant":
        return peak
    if config.schedule in ("cosine", "linear"):
        end = length if config.decay is None else config.decay
        shape = DECAYS[config.schedule]
        return _between(least, peak, shape, _part(done, warmup, end))
    if config.schedule == "wsd":
        start = max(warmup, length - (max(1, length // 10) if config.decay is None else config.decay))
        top = peak
    else:
        start = max(warmup, length - (config.decay or 0))
        top = max(least, peak * math.sqrt(warmup / min(done, start)))
        if not config.decay:
            return top
    return _between(least, top, DECAYS[config.decay_shape], _part(done, start, length))


def _part(done: int, start: int, end: int) -> float:
    """How much of the way from `start` to `end` is done, 0 to 1."""
    if done <= start:
        return 0.0
    return 1.0 if done >= end else (done - start) / (end - start)


def _between(least: float, top: float, shape: Callable[[float], float], part: float) -> float:
    if part in (0.0, 1.0):  # exactly
        return least if part else top
    return least + (top - least) * shape(part)


DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda part: 1.0 - part,
    "cosine": lambda part: (1.0 + math.cos(math.pi * part)) / 2.0,
    "1-sqrt": lambda part: 1.0 - math.sqrt(part),
}
