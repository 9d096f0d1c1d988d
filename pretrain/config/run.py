"""A whole run's configuration, and its stages."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from data_scheduler.config import DataConfig, StrictModel
from data_scheduler.objectives.config import sees_ahead
from data_scheduler.stage_config import Stage, with_stages
from pretrain.config.alerts import AlertsConfig
from pretrain.config.learning_rate import LearningRateConfig, LearningRateSegment, check_schedule
from pretrain.config.model import KernelsConfig, ModelConfig
from pretrain.config.numbers import Positive, PositiveFloat
from pretrain.config.recovery import RecoveryConfig
from pretrain.config.rope import RopeScalingConfig
from pretrain.config.services import ControlConfig, MetricsConfig, MonitorConfig
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
    rope_scaling: RopeScalingConfig | None = None
    """`model.rope_scaling` from here on."""
    micro_batch_size: Positive | None = None
    """`train.micro_batch_size` from here on: fewer sequences at once, where they are longer."""
    lr_scale: PositiveFloat | None = None
    """Factor of the learning rate from here on."""
    parallel: ParallelConfig | None = None
    """The whole `parallel` section from here on, of as many processes: the run saves, and goes on in the new layout."""
    trainable: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = None
    """Update only parameters whose names match one of these patterns, e.g. `decoder.layers.*.mlp.*` or `embedding*`;
    the others stay as they are. `["*"]`: all again."""
    learning_rate: LearningRateSegment | None = None
    """A schedule of its own, from here to the next stage that has one."""


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
    recovery: RecoveryConfig = RecoveryConfig()
    metrics: MetricsConfig = MetricsConfig()
    alerts: AlertsConfig = AlertsConfig()
    control: ControlConfig = ControlConfig()
    monitor: MonitorConfig = MonitorConfig()

    @model_validator(mode="after")
    def _measured_steps_are_whole(self) -> "RunConfig":
        if self.metrics.dynamics.every and self.train.selection is not None:
            raise ValueError(
                "metrics.dynamics.every: a step of train.selection holds padding, how much depends on the layout, "
                "and it would be measured too; set it to 0"
            )
        if self.metrics.dynamics.every and self.model.num_experts is not None:
            raise ValueError("metrics.dynamics.every: it does not know experts (model.num_experts); set it to 0")
        return self

    @model_validator(mode="after")
    def _copies_go_elsewhere(self) -> "RunConfig":
        place = self.checkpoint.copy_to
        if place is not None and "://" not in place:
            run, there = Path(self.run.dir).resolve(), Path(place).resolve()
            if there == run or run in there.parents:
                raise ValueError(f"checkpoint.copy_to: {place} is in the run's own folder; name a place elsewhere")
        return self

    @model_validator(mode="after")
    def _replicas_are_there(self) -> "RunConfig":
        layouts = [self.parallel, *(stage.parallel for stage in self.stages if stage.parallel is not None)]
        if self.recovery.replicas_every and any(each.fully_sharded for each in layouts):
            raise ValueError("recovery.replicas_every: with parallel.fully_sharded no rank holds what another does; 0")
        return self

    @model_validator(mode="after")
    def _padding_is_not_balanced(self) -> "RunConfig":
        if self.train.selection is not None and self.model.num_experts is not None and self.model.moe_aux_loss:
            raise ValueError(
                "train.selection: a step of it holds padding, how much depends on the layout, which model.moe_aux_loss "
                "would balance too; set that to 0"
            )
        return self

    @model_validator(mode="after")
    def _layouts_can_see_ahead(self) -> "RunConfig":
        layouts = [self.parallel, *(stage.parallel for stage in self.stages if stage.parallel is not None)]
        if any(each.context_parallel_size > 1 and each.context_parallel_method != "all_to_all" for each in layouts):
            for source in self.data.sources:
                if sees_ahead(self.data.objectives_of(source)):
                    raise ValueError(
                        f"data.objectives: those of source {source.name} see their input in both directions, which "
                        "needs parallel.context_parallel_method all_to_all, or no context parallelism; or set "
                        "`bidirectional: false` on them"
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

    @model_validator(mode="after")
    def _schedules_make_sense(self) -> "RunConfig":
        schedule: LearningRateConfig = self.optimizer
        check_schedule(schedule, "optimizer")
        for number, stage in enumerate(self.stages):
            if stage.learning_rate is not None:
                schedule = stage.learning_rate.after(schedule)
                check_schedule(schedule, f"stages.{number}.learning_rate")
        return self

    @model_validator(mode="after")
    def _optimizer_fits_precision_and_layout(self) -> "RunConfig":
        if self.optimizer.kind == "muon" and self.train.precision == "fp16":
            # Two optimizers would each keep a loss scale of their own.
            raise ValueError("optimizer.kind: muon does not go with train.precision: fp16; use bf16 or fp32")
        if self.model.num_experts is not None and self.train.precision == "fp16":
            # Likewise: megatron-core has an optimizer of its own for experts.
            raise ValueError("model.num_experts does not go with train.precision: fp16; use bf16 or fp32")
        layouts = [self.parallel, *(stage.parallel for stage in self.stages if stage.parallel is not None)]
        if self.optimizer.kind != "adamw" and any(parallel.overlap_param_gather for parallel in layouts):
            raise ValueError(f"parallel.overlap_param_gather does not go with optimizer.kind: {self.optimizer.kind}")
        if self.optimizer.kind != "adamw" and self.model.num_experts is not None:  # split over groups of their own
            raise ValueError(
                f"optimizer.kind: {self.optimizer.kind} does not know experts (model.num_experts); train a mixture of "
                "experts with adamw"
            )
        if not any(parallel.fully_sharded for parallel in layouts):
            return self
        if self.optimizer.kind != "adamw":
            raise ValueError(
                f"optimizer.kind: {self.optimizer.kind} does not go with parallel.fully_sharded; use adamw"
            )
        if self.train.precision == "fp16":
            raise ValueError("train.precision: fp16 does not go with parallel.fully_sharded; use bf16 or fp32")
        if self.model.num_experts is not None or self.model.mtp is not None:
            raise ValueError("parallel.fully_sharded does not go with model.num_experts or model.mtp; set it to false")
        return self


_STAGES = TypeAdapter(list[RunStage])
