"""The thread that prepares batches ahead of their use.

It holds whoever produces them only while it does: a scheduler that nobody uses any more, closed or not, goes, and its
thread with it.
"""

import queue
import threading
import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Stopped(Exception):
    """Raised inside the loader thread to leave a wait when the scheduler is closed."""


class Loader(Generic[T]):
    """A thread that keeps up to `depth` produced batches ready."""

    def __init__(self, produce: Callable[[], T], depth: int) -> None:
        """`produce`: a bound method."""
        self.stopping = threading.Event()
        self._produce = weakref.WeakMethod(produce)
        self._ready: queue.Queue[T | BaseException] = queue.Queue(maxsize=depth)
        self._thread = threading.Thread(target=self._run, name="headrace-loader", daemon=True)
        self._thread.start()

    def get(self) -> T:
        """The next batch; raises what producing it raised."""
        item = self._ready.get()
        if isinstance(item, BaseException):
            self._ready.put(item)  # a consumer that asks again is told again
            raise item
        return item

    def stop(self) -> None:
        """End the thread; what it had prepared is dropped."""
        self.stopping.set()
        if threading.current_thread() is self._thread:  # it held the producer last
            return
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.01)
            except queue.Empty:
                continue
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self.stopping.is_set() and (produce := self._produce()) is not None:
                produced = produce()
                del produce
                self._ready.put(produced)
                del produced
        except Stopped:
            pass
        except BaseException as error:
            self._ready.put(error)
