"""The layouts of a run: one, or one for each stretch of stages that names its own."""

from headrace.errors import LayoutError
from parallel.layout import Layout, validate
from pretrain.config import ParallelConfig, RunConfig
from pretrain.models.sizes import layout_shapes


def layout_from(parallel: ParallelConfig, world_size: int) -> Layout:
    """A `parallel` section on `world_size` processes."""
    return Layout(world_size, **parallel.model_dump())


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
