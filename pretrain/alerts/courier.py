"""The process that delivers: `main`, with lines of JSON on its standard input.

    {"run": "wonton", "hooks": [...], "stall_s": 600, "repeat_s": 3600, ..., "log": "<run>/log/alerts.jsonl"}   first
    {"step": 12}                                                                  a beat: the run makes progress
    {"event": "rollback", "step": 12, "text": "back to step 8"}                   to be told
    {"over": true}                                                                the run has ended, and has told how

The end of the input without `over` means that the trainer was killed: `run_failed`. Every event, sent or held back, and
every delivery that succeeded or was given up is a line of the log, from which the next courier of the run knows what
was sent before.

Each hook has a thread and a queue: a mail server that is down does not hold up Slack. When all is delivered, or
`linger_s` after the end, the process ends.
"""

import contextlib
import json
import os
import queue
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pretrain.alerts.hooks import NotDelivered, deliver

ALWAYS = frozenset({"run_finished"})
LONGEST_PAUSE_S = 300.0
GIVE_UP_S = 3600.0
QUEUE = 100
"""Messages that wait for one hook; with more, the newest are dropped: the first ones say what began it."""


class Courier:
    """Takes events, and hands those that are due to the hooks' threads."""

    def __init__(self, config: Mapping[str, Any], clock: Callable[[], float] = time.time) -> None:
        self._config, self._clock = config, clock
        self._log = Path(config["log"])
        self._lock = threading.Lock()
        self._sent, self._held = _sent_before(self._log)
        self._over = threading.Event()
        self._step = int(config.get("step", 0))
        self._queues: list[queue.Queue[dict[str, Any] | None]] = []
        self._threads: list[threading.Thread] = []
        for number, hook in enumerate(config["hooks"]):
            waiting: queue.Queue[dict[str, Any] | None] = queue.Queue(QUEUE + 1)
            thread = threading.Thread(target=self._serve, args=(number, hook, waiting), daemon=True)
            self._queues.append(waiting)
            self._threads.append(thread)
            thread.start()

    def take(self, said: Mapping[str, Any]) -> None:
        """One line of the trainer's that is no end."""
        self._step = int(said.get("step", self._step))
        if "event" in said:
            self.tell(said["event"], said["text"])

    def tell(self, event: str, text: str) -> None:
        """Send an event unless it was sent a short while ago."""
        now = self._clock()
        message = {"run": self._config["run"], "event": event, "text": text, "step": self._step, "time": now}
        message |= {"host": socket.gethostname(), "suppressed": self._held.get(event, 0)}
        if event not in ALWAYS and 0 <= now - self._sent.get(event, float("-inf")) < self._config["repeat_s"]:
            self._held[event] = self._held.get(event, 0) + 1
            return self._note({"state": "held back", **message})
        self._sent[event], self._held[event] = now, 0
        self._note({"state": "sent", **message})
        for hook, waiting in zip(self._config["hooks"], self._queues, strict=True):
            if event in hook["events"] and waiting.qsize() < QUEUE:
                waiting.put(message)
        return None

    def end(self) -> None:
        """Wait for what is still to be delivered, `linger_s` at most."""
        for waiting in self._queues:
            waiting.put(None)
        until = time.monotonic() + self._config["linger_s"]
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        self._over.set()

    def _serve(self, number: int, hook: Mapping[str, Any], waiting: "queue.Queue[dict[str, Any] | None]") -> None:
        while (message := waiting.get()) is not None:
            began, pause = time.monotonic(), self._config["retry_s"]
            said = {"hook": number, "kind": hook["kind"], "event": message["event"]}
            while True:
                try:
                    deliver(hook, message, os.environ, self._config["timeout_s"])
                except NotDelivered as error:
                    if time.monotonic() - began + pause > GIVE_UP_S:
                        self._note({"state": "given up", **said, "why": str(error)})
                        break
                    self._note({"state": "failed", **said, "why": str(error)})
                    if self._over.wait(pause):
                        return
                    pause = min(2 * pause, LONGEST_PAUSE_S)
                else:
                    self._note({"state": "delivered", **said})
                    break

    def _note(self, entry: dict[str, Any]) -> None:
        line = json.dumps({**entry, "noted": self._clock()}, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        # A full disk must not keep the message about it from being sent.
        with self._lock, contextlib.suppress(OSError), self._log.open("ab") as file:
            file.write(line)


def _sent_before(log: Path) -> tuple[dict[str, float], dict[str, int]]:
    """When each event was last sent, and how many were held back since, as couriers before noted it."""
    sent: dict[str, float] = {}
    held: dict[str, int] = {}
    with contextlib.suppress(OSError):
        for line in log.read_bytes().splitlines():
            try:
                entry = json.loads(line)
                event, state = entry["event"], entry["state"]
                if state == "sent":
                    sent[event], held[event] = float(entry["time"]), 0
                elif state == "held back":
                    held[event] = held.get(event, 0) + 1
            except (ValueError, KeyError, TypeError):
                continue  # torn by a kill
    return sent, held


def listen(source: int, courier: Courier, stall_s: float) -> None:
    """Take lines from the file descriptor `source` until it ends; tell of a stall, and of an end without a word."""
    rest, stalled, over = b"", False, False
    while True:
        if stall_s and not stalled and not over:
            ready, _, _ = select.select([source], [], [], stall_s)
            if not ready:
                stalled = True
                courier.tell("stall", f"no sign of progress for {stall_s:g} s")
                continue
        part = os.read(source, 1 << 16)
        if not part:
            break
        stalled = False
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            said = json.loads(line)
            over = over or "over" in said
            courier.take(said)
    if not over:
        courier.tell("run_failed", "the training process ended without a word: it was killed, or its machine was")
    courier.end()


def main() -> None:
    """Deliver what standard input tells."""
    # The signals that tell a run to stop go to its whole process group; the courier is still needed then.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    first = b""
    while not first.endswith(b"\n"):
        part = os.read(0, 1)
        if not part:
            sys.exit(0)
        first += part
    config = json.loads(first)
    listen(0, Courier(config), config["stall_s"])
