"""Stages as they are configured: stretches of a run with a batch shape, weights and policy of their own.

    stages:
      - {from_step: 1000, seq_len: 4096}                         seq_len from step 1000 on
      - {from_step: 2000, batch_ramp: {to: 960, multiply: 2, every: 500}}

`stages.py` turns them into the steps where something changes.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from data_scheduler.stages import UNITS, check_unit
from data_scheduler.strict_model import StrictModel


class BatchRamp(StrictModel):
    """A global batch size that grows in steps."""

    to: Annotated[int, Field(ge=1)]
    """Sequences per step in the end."""
    add: Annotated[int, Field(ge=1)] | None = None
    """Sequences added each time; this or `multiply`."""
    multiply: Annotated[int, Field(ge=2)] | None = None
    """Factor of each time: 2 doubles."""
    every: Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
    """From one growth to the next, in the unit in which the stages begin: steps, tokens, or a share of the run. The
    first growth is where the stage begins."""


class StagePolicy(StrictModel):
    """The policy of a stage. Horizon, guard-rails and `dry_run` are those of `data.policy` throughout."""

    kind: str
    """Name of a policy, as in `data.policy`."""
    options: dict[str, Any] = {}
    """Handed to the policy as keyword arguments."""


class Stage(StrictModel):
    """A stretch of the run, up to where the next stage begins. What it does not name stays as it was."""

    from_step: Annotated[int, Field(ge=0)] | None = None
    """Its first step. One of the three says where a stage begins, the same one in all stages."""
    from_tokens: Annotated[int, Field(ge=0)] | None = None
    """It begins with the first step before which the run was given so many tokens: `seq_len` · `global_batch_size` of
    every step before."""
    from_share: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    """It begins after this share of the run's steps, 0 to 1; for runs whose length is known (`train.steps`)."""
    seq_len: Annotated[int, Field(ge=1)] | None = None
    """`data.seq_len` from here on."""
    global_batch_size: Annotated[int, Field(ge=1)] | None = None
    """`data.global_batch_size` from here on."""
    batch_ramp: BatchRamp | None = None
    """Lets the global batch size grow from what it was before."""
    weights: dict[str, Annotated[float, Field(ge=0.0, allow_inf_nan=False)]] | None = None
    """The sources' weights from here on; a source that is not named has 0."""
    policy: StagePolicy | None = None
    """Who sets the mixture weights from here on; it begins anew with the stage, unless it was this very one before."""

    @model_validator(mode="after")
    def _begins_and_grows_in_one_way(self) -> "Stage":
        check_unit(self)
        return self

    @property
    def unit(self) -> str:
        """Which of the three says where it begins."""
        return next(unit for unit in UNITS if getattr(self, unit) is not None)

    @property
    def begin(self) -> int | float:
        """Where it begins, in its unit."""
        begin: int | float = getattr(self, self.unit)
        return begin


def with_stages(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The `data` section of a run's raw configuration with what the run's `stages` say about the data.

    Raises ValueError when the section has other stages of its own.
    """
    data, stages = dict(raw["data"]), raw.get("stages")
    if isinstance(stages, list) and stages:
        keys = Stage.model_fields
        own = [{k: v for k, v in stage.items() if k in keys} if isinstance(stage, dict) else stage for stage in stages]
        if data.get("stages", own) not in ([], own):
            raise ValueError("data.stages is another list than stages; leave it out")
        data["stages"] = own
    return data
