"""Errors that rank 0 alone meets in the middle of a save, kept until all ranks can hear of them.

    with errors_at_the_end():
        request = dist_checkpointing.save(..., async_sharded_save=True)

megatron lets rank 0 write a few small files (`common.pt`, `.metadata`, `metadata.json`) between collectives. Raised
there, an error would leave the other ranks waiting in the next collective until the watchdog ends them. Inside this
context such an error waits: rank 0 goes through the collectives that are left, and raises it at the end of the context.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

from parallel.engine import FileSystemWriterAsync, TorchCommonSaveStrategy, serialization

WRITTEN_BY_RANK_0 = (
    (TorchCommonSaveStrategy, "save_common"),
    (FileSystemWriterAsync, "finish"),
    (serialization, "save_config"),
)


@contextmanager
def errors_at_the_end() -> Iterator[None]:
    """Raises the first of them at the end, unless the block itself raises."""
    errors: list[Exception] = []
    with ExitStack() as restoring:
        for owner, name in WRITTEN_BY_RANK_0:
            original = getattr(owner, name)
            setattr(owner, name, _keeping(original, errors))
            restoring.callback(setattr, owner, name, original)
        yield
    if errors:
        raise errors[0]


def _keeping(act: Callable[..., Any], errors: list[Exception]) -> Callable[..., Any]:
    @wraps(act)
    def quiet(*args: Any, **kwargs: Any) -> Any:
        try:
            return act(*args, **kwargs)
        except Exception as error:
            errors.append(error)

    return quiet
