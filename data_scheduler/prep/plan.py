"""From the configuration to passes: datatrove pipelines that run one after the other.

[read, count, filter, count, filter, write work/, collect]      a task a file
[merge what was collected]                                      a few tasks
[read work/, count, dedup, count, score, count, write data/]    a task a file
[report]                                                        one task
"""

import os
from dataclasses import dataclass

from datatrove.pipeline.base import PipelineStep

from data_scheduler.prep.config import PrepConfig
from data_scheduler.prep.reader import CorpusReader, WorkReader
from data_scheduler.prep.steps import step_blocks
from data_scheduler.prep.tally import Tally, WriteReport
from data_scheduler.prep.writers import OutputJsonl, OutputParquet, WorkWriter


@dataclass(frozen=True)
class Pass:
    """One datatrove run; its tasks may run at the same time, the next pass begins when all are done."""

    name: str
    tasks: int
    pipeline: list[PipelineStep]
    logs: str
    """datatrove's logging folder: completions, statistics, logs."""


def make_passes(config: PrepConfig, files: list[str]) -> list[Pass]:
    """All passes, in order. Raises ConfigError when a step needs something that is not installed."""
    work = os.path.join(config.out, "work")
    passes: list[Pass] = []

    def add(name: str, tasks: int, pipeline: list[PipelineStep]) -> None:
        name = f"{len(passes):02d}-{name}"
        passes.append(Pass(name, tasks, pipeline, os.path.join(work, name)))

    labels = step_labels(config)
    pipeline: list[PipelineStep] = [CorpusReader(files, config.input, os.path.join(work, "read"))]
    doing = "read"
    for label, step in zip(labels, config.steps, strict=True):
        folder = os.path.join(work, f"step-{label}")
        removed = os.path.join(config.out, "removed", label) if config.keep_removed else None
        blocks = step_blocks(step, config.words, folder, removed)
        if blocks.collect is not None:
            documents = os.path.join(folder, "documents")
            add(doing, len(files), [*pipeline, WorkWriter(documents), blocks.collect])
            for between in blocks.between:
                add(between.name, between.tasks, between.blocks)
            pipeline, doing = [WorkReader(documents)], step.kind
        pipeline += [Tally(label), blocks.apply]
    data = os.path.join(config.out, "data")
    output = OutputParquet if config.output_format == "parquet" else OutputJsonl
    add(doing, len(files), [*pipeline, Tally("out"), output(data, config.columns())])
    add("report", 1, [WriteReport(config.out, [*labels, "out"], [done.logs for done in passes])])
    return passes


def step_labels(config: PrepConfig) -> list[str]:
    """`0-gopher_quality`, `1-exact_dedup`, …: names of steps in the report and of folders in `removed/`."""
    return [f"{number}-{step.kind}" for number, step in enumerate(config.steps)]
