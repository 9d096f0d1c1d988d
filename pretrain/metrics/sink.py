"""What every tracker offers the training loop, and the wrapper that keeps a broken one from stopping it."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from pretrain.metrics.registry import Record

log = logging.getLogger(__name__)


class Sink(Protocol):
    """Takes records until it is closed."""

    def write(self, record: Record) -> None:
        """Take one training or evaluation record (see `registry`)."""
        ...

    def close(self) -> None:
        """Hand over what is still held back; a second call does nothing."""
        ...


class Guarded:
    """A sink whose failures cost its own records and nothing else: one warning, then it is dropped."""

    def __init__(self, sink: Sink, name: str) -> None:
        self._sink: Sink | None = sink
        self._name = name

    def write(self, record: Record) -> None:
        """Pass `record` on while the sink works."""
        if self._sink is None:
            return
        try:
            self._sink.write(record)
        except Exception as error:
            broken, self._sink = self._sink, None
            log.warning("metrics.%s failed and gets no more records; metrics.jsonl has them all: %s", self._name, error)
            try:
                broken.close()
            except Exception:
                log.debug("closing metrics.%s failed too", self._name, exc_info=True)

    def close(self) -> None:
        """Close the sink if it still works."""
        if self._sink is None:
            return
        closing, self._sink = self._sink, None
        try:
            closing.close()
        except Exception as error:
            log.warning("closing metrics.%s failed: %s", self._name, error)


@contextmanager
def closing(sinks: Sequence[Sink]) -> Iterator[Sequence[Sink]]:
    """Closes `sinks` at the end, also that by an exception: wandb keeps its last records back until then."""
    try:
        yield sinks
    finally:
        for sink in sinks:
            sink.close()
