"""How an arm takes turns: it trains in a loop of its own and passes the gate after every step."""

import json
import sys
import time
from typing import IO, Any


class Gate:
    """Reads a number of steps from `orders`, lets as many pass, answers with what they took; 0 ends the arm."""

    def __init__(self, orders: IO[str], answers: IO[str]) -> None:
        self._orders, self._answers = orders, answers
        self._left = 0
        self._losses: list[float] = []

    def ready(self, **facts: Any) -> None:
        """Say that the arm stands, with what is to be known of it, and wait for the first order."""
        self._answer(facts)
        self._wait()

    def step(self, loss: float) -> None:
        """A step is done; returns when the next one is wanted."""
        self._losses.append(loss)
        self._left -= 1
        if self._left:
            return
        cpu_s, wall_s = time.process_time() - self._cpu, time.perf_counter() - self._wall
        self._answer({"cpu_s": cpu_s, "wall_s": wall_s, "losses": self._losses})
        self._wait()

    def _answer(self, facts: dict[str, Any]) -> None:
        self._answers.write(json.dumps(facts) + "\n")
        self._answers.flush()

    def _wait(self) -> None:
        line = self._orders.readline()
        self._left, self._losses = int(line or 0), []
        if not self._left:
            sys.exit(0)
        self._cpu, self._wall = time.process_time(), time.perf_counter()
