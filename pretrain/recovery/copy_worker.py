"""The process that copies finished checkpoints to a second place: `python -m pretrain.recovery.copy_worker ORDERS`.

In, one line each on standard input: the folder of a checkpoint that is whole. Out, one JSON object a line:

    {"step": 100, "told": "copied", "seconds": 3.1}
    {"step": 200, "told": "again", "why": "s3://…: cannot be reached after 4 tries: …", "wait_s": 2.0}
    {"step": 200, "told": "dropped", "why": "…"}

One checkpoint at a time; when several wait, the newest is copied and the others are passed over. What fails is tried
again, after 1, 2, 4 and at last every 300 seconds, until it succeeds or a newer checkpoint waits. The end of standard
input is the end of the run, or of whoever was to say so: the process leaves at once.
"""

import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tenacity

from headrace.errors import HeadraceError
from pretrain.recovery.manifest import DamagedCheckpoint
from pretrain.recovery.second_place import SecondPlace

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 300.0


@dataclass(frozen=True)
class Orders:
    """What the process is told on its command line, as JSON."""

    url: str
    journal: str
    keep_last: int
    keep_every: int

    def text(self) -> str:
        """As the command line has it."""
        return json.dumps(asdict(self))


class _Waiting:
    """The checkpoint to copy next: the newest that was named."""

    def __init__(self) -> None:
        self.arrived = threading.Event()
        self._folder: Path | None = None
        self._lock = threading.Lock()

    def listen(self) -> None:
        """Read standard input to its end, which is that of this process."""
        for line in sys.stdin:
            with self._lock:
                passed_over, self._folder = self._folder, Path(line.strip())
                self.arrived.set()
            if passed_over is not None:
                _tell(passed_over, "dropped", why="a newer one was there before its turn came")
        os._exit(0)

    def take(self) -> Path:
        """Wait for a checkpoint and take it."""
        self.arrived.wait()
        with self._lock:
            self.arrived.clear()
            folder, self._folder = self._folder, None
        assert folder is not None
        return folder


def main(orders: Orders) -> None:
    """Copy what is named, for ever."""
    waiting = _Waiting()
    threading.Thread(target=waiting.listen, daemon=True).start()
    while True:
        _copy(waiting.take(), orders, waiting.arrived)


def _copy(folder: Path, orders: Orders, newer: threading.Event) -> None:
    began = time.monotonic()

    def once() -> bool:
        place = SecondPlace(orders.url)
        new = place.put(folder, Path(orders.journal))
        place.retire(_step(folder), orders.keep_last, orders.keep_every)
        return new

    def may_help(error: BaseException) -> bool:
        return (
            isinstance(error, HeadraceError | OSError) and not isinstance(error, DamagedCheckpoint) and folder.is_dir()
        )

    def say_why(state: tenacity.RetryCallState) -> None:
        assert state.outcome is not None
        _tell(folder, "again", why=_why(state.outcome.exception()), wait_s=state.upcoming_sleep)

    trying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(may_help),
        wait=tenacity.wait_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S),
        sleep=tenacity.sleep_using_event(newer),
        stop=tenacity.stop_when_event_set(newer),
        before_sleep=say_why,
        reraise=True,
    )
    try:
        new = trying(once)
    except (HeadraceError, OSError) as error:
        _tell(folder, "dropped", why=_why(error))
    else:
        _tell(folder, "copied" if new else "there", seconds=round(time.monotonic() - began, 1))


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _why(error: BaseException | None) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return str(error)


def _tell(folder: Path, told: str, **more: Any) -> None:
    try:
        sys.stdout.write(json.dumps({"step": _step(folder), "told": told, **more}) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # the run is gone
        os._exit(0)


if __name__ == "__main__":
    main(Orders(**json.loads(sys.argv[1])))
