"""Copies of finished checkpoints in a second place (`checkpoint.copy_to`), made behind the run's back.

    copies = Copies(config.checkpoint, run_dir, rank, tell)    # every rank; rank 0 has the process that copies
    copies.send(path)                                          # a checkpoint is whole
    copies.hear()                                              # between two steps: tell people what happened
    copies.finish(beat)                                        # every rank, at the run's end

Nothing that goes wrong here stops the run: it is said, and tried again. The process is a fresh interpreter
(`copy_worker.py`), since one that was forked would have the run's threads and devices; it leaves when the run does.
"""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from parallel import exchange
from pretrain.config import CheckpointConfig
from pretrain.recovery.copy_worker import Orders

STARTS = 3
"""How often a process that ended by itself (out of memory) is started again before a newer checkpoint is there."""
TOGETHER_S = 0.2
"""At the end ranks meet again after so many seconds, far below any timeout of a collective."""


class Copies:
    """A rank's part in copying; without `copy_to` it does nothing."""

    def __init__(self, config: CheckpointConfig, run_dir: Path, rank: int, tell: Callable[[str], None]) -> None:
        self._url, self._wait_s = config.copy_to, config.copy_wait_s
        self._is_worker = rank == 0 and bool(config.copy_to)
        journal = str((run_dir / "journal.jsonl").resolve())
        self._orders = Orders(config.copy_to or "", journal, config.copy_keep_last, config.keep_every)
        self._tell = tell
        self._process: subprocess.Popen[str] | None = None
        self._heard: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._sent: Path | None = None
        """The newest checkpoint that was sent and is not copied."""
        self._starts = 0
        self.unfinished: set[int] = set()
        """Steps that are not copied yet, whose folders must stay; of rank 0."""

    def send(self, path: Path) -> None:
        """Have a finished checkpoint copied."""
        if not self._is_worker:
            return
        self._sent, self._starts = path.resolve(), 0
        self.unfinished.add(_step(path))
        self._pass_on()

    def hear(self) -> None:
        """Tell what has happened since, and see that somebody copies."""
        if not self._is_worker:
            return
        while not self._heard.empty():
            self._take(self._heard.get())
        if self._sent is None or self._process is None or self._process.poll() is None or self._starts >= STARTS:
            return
        self._tell(
            f"warning: the process that copies checkpoints ended with exit code {self._process.returncode}; "
            f"{'started again' if self._starts + 1 < STARTS else 'the next checkpoint starts it again'}"
        )
        self._starts += 1
        if self._starts < STARTS:
            self._pass_on()

    def finish(self, beat: Callable[[str], None]) -> None:
        """Wait until all is copied, `copy_wait_s` seconds at most; every rank calls this. `beat` hears of progress."""
        if not self._url:
            return
        deadline = time.monotonic() + self._wait_s
        while True:
            self.hear()
            busy = self._sent is not None and self._starts < STARTS
            (waits,) = exchange.largest([float(busy and time.monotonic() < deadline)])
            if not waits:
                break
            beat(f"waiting for the copy of a checkpoint to {self._url}")
            time.sleep(TOGETHER_S)
        if self._sent is not None:
            self._tell(
                f"warning: the checkpoint of step {_step(self._sent)} is not in {self._url}; it is in "
                f"{self._sent}, and the run's next start copies it"
            )
        self.close()

    def close(self) -> None:
        """End the process; a copy that is being made is left without its manifest."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()

    def _pass_on(self) -> None:
        if self._process is None or self._process.poll() is not None:
            self.close()
            assert self._sent is not None
            self.unfinished = {_step(self._sent)}  # a new process knows of no other
            self._process = _start(self._orders)
            threading.Thread(target=_listen, args=(self._process, self._heard), daemon=True).start()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{self._sent}\n")
            self._process.stdin.flush()
        except OSError:  # it has just ended; `hear` will see it
            return

    def _take(self, heard: dict[str, Any]) -> None:
        step, told = heard["step"], heard["told"]
        if told == "again":
            wait_s = heard["wait_s"]
            self._tell(f"warning: checkpoint of step {step} not copied: {heard['why']}; tried again in {wait_s:.0f} s")
            return
        self.unfinished.discard(step)
        if self._sent is not None and _step(self._sent) == step:
            self._sent = None
        if told == "copied":
            self._tell(f"checkpoint of step {step} copied to {self._url} in {heard['seconds']:.1f} s")
        elif told == "dropped":
            self._tell(f"warning: checkpoint of step {step} not copied to {self._url}: {heard['why']}")


def _start(orders: Orders) -> subprocess.Popen[str]:
    # So that it runs the code of this very process, installed or not.
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-m", "pretrain.recovery.copy_worker", orders.text()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        # Signals to the run's session are for the run, which waits for this process.
        start_new_session=True,
    )


def _listen(process: "subprocess.Popen[str]", heard: "queue.SimpleQueue[dict[str, Any]]") -> None:
    assert process.stdout is not None
    try:
        for line in process.stdout:
            heard.put(json.loads(line))
    except ValueError:  # the pipe was closed, or its end was a torn line
        return


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
