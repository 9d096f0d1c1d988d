"""The learning rate of a run, and of a stretch of it."""

from typing import Literal

from data_scheduler.config import StrictModel
from pretrain.config.numbers import NonNegative, NonNegativeFloat, PositiveFloat

ScheduleKind = Literal["cosine", "wsd", "linear", "constant", "inverse_sqrt"]
DecayShape = Literal["linear", "1-sqrt", "cosine"]
WITH_FINAL_DECAY = ("wsd", "inverse_sqrt")
"""Schedules with a `decay_shape`."""


class LearningRateConfig(StrictModel):
    """A learning-rate schedule: warm-up, then one shape; lengths in steps or in tokens."""

    lr: PositiveFloat = 3e-4
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 3e-5
    """Learning rate at the end of the decay."""
    schedule: ScheduleKind = "cosine"
    """Shape after the warm-up; `wsd` holds the peak and decays at the end, `inverse_sqrt` falls as √(warm-up / n)."""
    decay_shape: DecayShape = "linear"
    """Shape of the final decay of `wsd` and `inverse_sqrt`."""
    warmup_steps: NonNegative = 0
    """Steps of linear warm-up from 0."""
    decay_steps: NonNegative | None = None
    """`cosine`, `linear`: step at which min_lr is reached (default: the end). `wsd`, `inverse_sqrt`: length of the
    final decay (default: a tenth of the run, and none)."""
    warmup_tokens: NonNegative | None = None
    """Instead of `warmup_steps`: tokens given to the model, `seq_len` · `global_batch_size` of every step."""
    decay_tokens: NonNegative | None = None
    """Instead of `decay_steps`, likewise; with it or `warmup_tokens` the whole schedule is in tokens."""

    @property
    def in_tokens(self) -> bool:
        """Whether its lengths are tokens and not steps."""
        return self.warmup_tokens is not None or self.decay_tokens is not None

    @property
    def warmup(self) -> int:
        """Length of the warm-up, in its unit."""
        return (self.warmup_tokens or 0) if self.in_tokens else self.warmup_steps

    @property
    def decay(self) -> int | None:
        """`decay_steps` or `decay_tokens`."""
        return self.decay_tokens if self.in_tokens else self.decay_steps


class LearningRateSegment(StrictModel):
    """A schedule that begins with its stage and ends where the next one does, or the run. What it does not name is as
    in the segment before, but for the lengths: without them there is no warm-up and the defaults decay."""

    lr: PositiveFloat | None = None
    """Peak learning rate; the warm-up goes there from the rate of the step before."""
    min_lr: NonNegativeFloat | None = None
    """Learning rate at the end of the decay."""
    schedule: ScheduleKind | None = None
    """Shape after the warm-up, over this segment."""
    decay_shape: DecayShape | None = None
    """Shape of the final decay of `wsd` and `inverse_sqrt`."""
    warmup_steps: NonNegative = 0
    """Steps of warm-up."""
    decay_steps: NonNegative | None = None
    """As in `optimizer`, counted from the segment's begin, which the default ends with."""
    warmup_tokens: NonNegative | None = None
    """Instead of `warmup_steps`."""
    decay_tokens: NonNegative | None = None
    """Instead of `decay_steps`."""

    def after(self, before: LearningRateConfig) -> LearningRateConfig:
        """The whole schedule, with what the one before it had."""
        kept = before.model_dump(include={"lr", "min_lr", "schedule"})
        if (self.schedule or before.schedule) in WITH_FINAL_DECAY:
            kept["decay_shape"] = before.decay_shape
        named = {key: value for key, value in self.model_dump().items() if value is not None}
        return LearningRateConfig.model_validate(kept | named)


def check_schedule(config: LearningRateConfig, where: str) -> None:
    """Raise ValueError, naming `where`, for a schedule that means nothing."""
    if config.in_tokens and (config.warmup_steps or config.decay_steps is not None):
        raise ValueError(f"{where}: lengths are in steps or in tokens; give *_steps or *_tokens, not both")
    if config.schedule == "inverse_sqrt" and not config.warmup:
        raise ValueError(f"{where}: schedule inverse_sqrt falls as √(warm-up / n); give warmup_steps or warmup_tokens")
    if config.decay_shape != "linear" and config.schedule not in WITH_FINAL_DECAY:
        raise ValueError(f"{where}.decay_shape: schedule {config.schedule} has its own shape; leave decay_shape out")
    if config.min_lr > config.lr and config.schedule != "constant":
        raise ValueError(f"{where}: min_lr {config.min_lr:g} is above lr {config.lr:g}; give a lower min_lr")
