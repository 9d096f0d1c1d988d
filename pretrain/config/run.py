"""A whole run's configuration, and its stages."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from data_scheduler.config import DataConfig, Stage, StrictModel, with_stages
from data_scheduler.objectives.config import sees_ahead
from pretrain.config.model import KernelsConfig, ModelConfig
from pretrain.config.numbers import Positive, PositiveFloat
from pretrain.config.services import ControlConfig, MetricsConfig
from pretrain.config.training import CheckpointConfig, OptimizerConfig, ParallelConfig, TrainConfig


class RunSection(StrictModel):
    """Where the run lives."""

    dir: Annotated[str, Field(min_length=1)]
    """Run folder; everything the run writes is under it."""
    name: str = ""
    """Name for trackers; the run folder's name when empty."""


class RunStage(Stage):
    """A stretch of the run, up to where the next stage begins. What it does not name stays as it was before; before the
    first stage that is what the other sections say."""

    rope_base: PositiveFloat | None = None
    """`model.rope_base` from here on."""
    micro_batch_size: Positive | None = None
    """`train.micro_batch_size` from here on: fewer sequences at once, where they are longer."""
    lr_scale: PositiveFloat | None = None
    """Factor of the learning rate from here on."""


class RunConfig(StrictModel):
    """The whole configuration of a run; `headrace config schema` prints it as JSON schema."""

    run: RunSection
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    stages: Annotated[list[RunStage], Field(default_factory=list)]
    """What changes over the run, and where."""
    optimizer: OptimizerConfig = OptimizerConfig()
    parallel: ParallelConfig = ParallelConfig()
    kernels: KernelsConfig = KernelsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()
    control: ControlConfig = ControlConfig()

    @model_validator(mode="after")
    def _layout_can_see_ahead(self) -> "RunConfig":
        if self.parallel.context_parallel_size > 1:
            for source in self.data.sources:
                if sees_ahead(self.data.objectives_of(source)):
                    raise ValueError(
                        f"data.objectives: those of source {source.name} see their input in both directions, which "
                        "needs parallel.context_parallel_size 1; set `bidirectional: false` on them"
                    )
        return self

    @model_validator(mode="before")
    @classmethod
    def _data_has_its_stages(cls, raw: Any) -> Any:
        if not isinstance(raw, Mapping) or not isinstance(raw.get("data"), Mapping) or not raw.get("stages"):
            return raw
        try:
            _STAGES.validate_python(raw["stages"])
        except ValidationError:
            return raw  # to be named once, under `stages`
        return {**raw, "data": with_stages(raw)}


_STAGES = TypeAdapter(list[RunStage])
