"""What a run does about hangs, loss spikes and silent corruption: the `recovery` section."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from data_scheduler.config import StrictModel
from pretrain.config.numbers import NonNegative, Positive


class LossGuardConfig(StrictModel):
    """What happens when a step's loss is not finite, or when its loss or gradient norm jumps."""

    policy: Literal["off", "warn", "skip_step", "rollback"] = "warn"
    """`warn` says so; `skip_step` leaves the update out; `rollback` goes back to the newest checkpoint, does the steps
    again, and if the anomaly comes back leaves out its window. An update whose gradient is not finite is never made."""
    window: Annotated[int, Field(ge=8)] = 128
    """Steps from which the usual spread is taken."""
    min_steps: Annotated[int, Field(ge=8)] = 32
    """Judge nothing before so many steps: early losses fall fast."""
    threshold: Annotated[float, Field(gt=0)] = 10.0
    """Robust standard deviations above the last 16 steps' median from which a loss or gradient norm is a jump."""
    quarantine: Positive = 2
    """`rollback`: steps whose updates are left out, the anomalous one the last of them; twice as many at the next
    attempt, and so on."""
    max_attempts: Positive = 3
    """`rollback`: attempts with a window left out before the run gives up."""
    lr_factor: Annotated[float, Field(gt=0, le=1)] = 1.0
    """`rollback`: factor of the learning rate for `lr_steps` steps after a window that was left out."""
    lr_steps: NonNegative = 0

    @model_validator(mode="after")
    def _can_judge(self) -> "LossGuardConfig":
        if self.min_steps > self.window:
            raise ValueError("min_steps is more than window; there would never be as many")
        return self


class RecoveryConfig(StrictModel):
    """What a run does about hangs, loss spikes and silent corruption."""

    watchdog_s: Annotated[float, Field(ge=0)] = 540.0
    """A process that makes no progress for so many seconds writes its stacks to `<run>/log/watchdog-rank-*.txt` and
    ends with exit code 5. Longer than the longest step or save, and than reading the largest file of a checkpoint;
    0: no watchdog."""
    replicas_every: NonNegative = 0
    """Compare the weights of ranks that should hold the same every so many steps; 0: never."""
    stragglers_every: NonNegative = 50
    """Compare how long ranks compute before they meet, every so many steps; 0: never. With `parallel.fully_sharded`
    ranks meet at every layer, and it does nothing."""
    straggler_factor: Annotated[float, Field(gt=1)] = 1.5
    """A rank that takes longer than this many times the median of those that do the same work is a straggler."""
    loss_guard: LossGuardConfig = LossGuardConfig()
