"""What a stage changes for the trainer, and which stage a step is in.

The data scheduler journals when a stage begins, with its number; what else it means is looked up here by that number,
so that batch shape, rotary embedding and learning rate change with the same step, also after a resume.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from data_scheduler.journal import Journal
from data_scheduler.plan import Plan
from data_scheduler.stages import Turn, turns
from data_scheduler.timeline import Timeline
from pretrain.complete_checkpoints import complete_steps
from pretrain.config import ParallelConfig, RunConfig
from pretrain.config.learning_rate import LearningRateConfig
from pretrain.config.rope import RopeScalingConfig


class StageSettings(NamedTuple):
    """What holds for a step."""

    number: int | None
    """Of the stage, from 0; None before the first."""
    seq_len: int
    global_batch_size: int
    micro_batch_size: int
    rope_base: float
    rope_scaling: RopeScalingConfig | None
    lr_scale: float
    trainable: tuple[str, ...] | None
    """Patterns of the names of parameters that are updated; None: all are."""


def settings_of(config: RunConfig, shape: Mapping[str, int]) -> StageSettings:
    """What holds for the steps of `shape`, a batch shape as journaled."""
    number, size, base, scale = shape.get("stage"), config.train.micro_batch_size, config.model.rope_base, 1.0
    scaling, trainable = config.model.rope_scaling, None
    for stage in config.stages[: _stages_begun(number)]:
        size, base = stage.micro_batch_size or size, stage.rope_base or base
        scaling, scale = stage.rope_scaling or scaling, stage.lr_scale or scale
        trainable = trainable if stage.trainable is None else tuple(stage.trainable)
    return StageSettings(number, shape["seq_len"], shape["global_batch_size"], size, base, scaling, scale, trainable)


def schedule_began_with(config: RunConfig, number: int | None) -> int | None:
    """The stage that the learning-rate schedule of stage `number` began with; None: it is that of `optimizer`."""
    named = [at for at, stage in enumerate(config.stages[: _stages_begun(number)]) if stage.learning_rate is not None]
    return named[-1] if named else None


def schedule_of(config: RunConfig, number: int | None) -> LearningRateConfig:
    """The learning-rate schedule of stage `number`."""
    schedule: LearningRateConfig = config.optimizer
    for stage in config.stages[: _stages_begun(number)]:
        if stage.learning_rate is not None:
            schedule = stage.learning_rate.after(schedule)
    return schedule


def _stages_begun(number: int | None) -> int:
    return 0 if number is None else number + 1


def parallel_of(config: RunConfig, number: int | None) -> ParallelConfig:
    """How the model is spread over processes in stage `number`; None: before the first."""
    named = [stage.parallel for stage in config.stages[: _stages_begun(number)] if stage.parallel is not None]
    return named[-1] if named else config.parallel


def first_settings(config: RunConfig) -> StageSettings:
    """What holds for the first step of the run."""
    return settings_of(config, turns(config.data, config.train.steps, Timeline())[0].data)


def batches_ahead(config: RunConfig) -> list[Turn]:
    """The batch shapes that the run has yet to train with: from its newest checkpoint on, in its run folder.

    Raises CheckpointError when its journal is damaged.
    """
    step = max(complete_steps(config.run.dir), default=0)
    path = Path(config.run.dir) / "journal.jsonl"
    past = Plan(Journal(path, writable=False)).shape if step and path.exists() else Timeline()
    return turns(config.data, config.train.steps, past, step)
