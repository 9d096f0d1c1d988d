"""The layouts of a run: one, or one for each stretch of stages that names its own."""

import math

from headrace.errors import LayoutError
from parallel.layout import Layout, validate
from pretrain.config import ParallelConfig, RunConfig
from pretrain.models.sizes import layout_shapes

VOCAB_MULTIPLE = 128
"""Embedding rows are padded to a multiple of this: whole tensor-core tiles, and divisible by tensor-parallel sizes."""


def layout_from(parallel: ParallelConfig, world_size: int) -> Layout:
    """A `parallel` section on `world_size` processes."""
    return Layout(
        world_size=world_size,
        tensor_parallel_size=parallel.tensor_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_parallel_size=parallel.pipeline_parallel_size,
        virtual_pipeline_parallel_size=parallel.virtual_pipeline_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        distributed_optimizer=parallel.distributed_optimizer,
    )


def layouts_ahead(config: RunConfig, world_size: int, vocab_size: int) -> list[Layout]:
    """The layouts that the run has yet to train with, the first of them now.

    Raises LayoutError, naming the stage, when one does not fit its stages.
    """
    found = []
    for stage, parallel, shape in layout_shapes(config, vocab_size):
        layout = layout_from(parallel, world_size)
        try:
            validate(layout, shape)
        except LayoutError as error:
            if not found:
                raise
            raise LayoutError(f"stages.{stage}.parallel: {error}") from None
        found.append(layout)
    return found


def padded_vocab_size(config: RunConfig, tokens: int) -> int:
    """Embedding rows: the configured number, or the tokenizer's rounded up to VOCAB_MULTIPLE · tensor parallel size."""
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    multiple = VOCAB_MULTIPLE * tensor_parallel_multiple(config)
    return -(-tokens // multiple) * multiple


def tensor_parallel_multiple(config: RunConfig) -> int:
    """What the tensor-parallel sizes of all stages divide."""
    stages = [stage.parallel for stage in config.stages if stage.parallel is not None]
    return math.lcm(*(parallel.tensor_parallel_size for parallel in (config.parallel, *stages)))
