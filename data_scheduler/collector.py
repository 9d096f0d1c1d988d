"""Python's garbage collector, told to wait while very many objects are made that all stay."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collector_waits() -> Iterator[None]:
    """Without garbage collection. That so many objects are new makes the collector look through all there are, a tenth
    of a second in a process that has its libraries loaded: a third of a start with 10,000 files."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
