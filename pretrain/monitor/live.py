"""One stream of news to every open page: whether there is more to see, and the few numbers at its top.

Files are looked at once a second for all viewers together, and only those of runs that somebody looks at.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import orjson

LOOK_S: Final = 1.0
"""Between two looks at the files."""
ALIVE_S: Final = 15.0
"""After so long without news a comment is sent: whoever has gone is then noticed."""
MOST_VIEWERS: Final = 500
MOST_REPORTS: Final = 100
"""Failures that are written to the log."""
_log = logging.getLogger(__name__)


class News:
    """Tells what is new about each topic that somebody listens to."""

    def __init__(self, look: Callable[[str], Any]) -> None:
        """look: a topic's news as plain data, called in a thread; the same data is not told twice."""
        self._look = look
        self._listeners: dict[str, set[asyncio.Queue[bytes]]] = {}
        self._told: dict[str, bytes] = {}
        self._reported: set[tuple[str, type[Exception]]] = set()
        self._task: asyncio.Task[None] | None = None

    @property
    def is_full(self) -> bool:
        """Whether no more viewers can listen."""
        return sum(map(len, self._listeners.values())) >= MOST_VIEWERS

    async def stream(self, topic: str) -> AsyncIterator[bytes]:
        """Server-sent events about a topic, until the viewer goes away."""
        queue: asyncio.Queue[bytes] = asyncio.Queue(maxsize=2)
        self._listeners.setdefault(topic, set()).add(queue)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._tell())
        try:
            yield b"retry: 2000\n\n"
            if topic in self._told:
                yield self._told[topic]
            while True:
                try:
                    yield await asyncio.wait_for(queue.get(), ALIVE_S)
                except TimeoutError:
                    yield b": nothing new\n\n"
        finally:
            self._listeners[topic].discard(queue)
            if not self._listeners[topic]:
                del self._listeners[topic]
                self._told.pop(topic, None)

    async def _tell(self) -> None:
        while self._listeners:
            for topic in list(self._listeners):
                try:
                    message = b"data: " + orjson.dumps(await asyncio.to_thread(self._look, topic)) + b"\n\n"
                except Exception as error:  # one topic's trouble must not end the news of the others
                    self._report(topic, error)
                    continue
                if self._told.get(topic) == message:
                    continue
                if topic in self._listeners:
                    self._told[topic] = message
                for queue in self._listeners.get(topic, ()):
                    if queue.full():  # a viewer that reads slowly gets the newest only
                        queue.get_nowait()
                    queue.put_nowait(message)
            await asyncio.sleep(LOOK_S)

    def _report(self, topic: str, error: Exception) -> None:
        """Say what failed in the dashboard's log, once for each topic and kind of error."""
        if (topic, type(error)) not in self._reported and len(self._reported) < MOST_REPORTS:
            self._reported.add((topic, type(error)))
            _log.error("news of %r failed", topic or "all runs", exc_info=error)
