"""What came of every attempt of a run, and whether there is to be another: one rule for every launcher.

    attempts = Attempts(run_dir)
    attempts.start("local", "4242", ["mill"], 4)
    ...                                                   # the processes run and leave their exit codes
    decision = attempts.end(judge({0: 4, 1: 0}, first=0), Limits(), job="4242")
    decision.verdict                                      # "again": wait decision.pause_s, then start anew

The notes are `<run>/launch/attempts.jsonl`, one JSON object a line, only ever appended to: an attempt that has a start
and no end is one whose launcher died with its node. `submitted` (a person acted) starts all counts anew.

This file runs on compute nodes with the system's own `python3` (3.9 or newer), outside any container and before any
environment is set up: the standard library only.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FINISHED, STOP, AGAIN, SAVED, GIVE_UP = "finished", "stop", "again", "saved", "give-up"
"""Verdicts. `saved`: asked to leave, as before a time limit, and there is more to do; not a failure."""

PASSING = (4, 5)
"""Exit codes of failures that may pass: recoverable, watchdog (headrace/errors.py)."""
DECISIVE = (2, 3)
"""Exit codes that would come again: user error, data error. They win over those of peers that lost a connection."""
LONGEST_PAUSE_S = 60.0


@dataclass(frozen=True)
class Limits:
    """When a run is given up."""

    max_failures: int = 3
    """Failures in a row without a new checkpoint; one more ends the run."""
    max_same_step: int = 2
    """Failures after the same step, where attempts got to steps at all: a fault that comes again."""


@dataclass(frozen=True)
class Outcome:
    """How the processes of one attempt ended, taken together."""

    verdict: str
    code: int
    """One exit code for all; 4 where processes left none."""
    why: str = ""
    lost: bool = False
    """Processes left no exit code: killed, or their node is gone."""


@dataclass(frozen=True)
class Decision:
    """What to do after an attempt."""

    verdict: str
    code: int
    why: str
    pause_s: float = 0.0
    """Before the next attempt: a lost network or a store that is down gets time to come back."""


def judge(codes: Mapping[int, int | None], first: int | None) -> Outcome:
    """One outcome of the exit codes of all ranks: None where a rank left none, -N or 128+N where signal N ended it.

    `first` is the rank that failed first: what the others report is often only that a peer is gone.
    """
    for rank, code in codes.items():
        if code in DECISIVE:
            return Outcome(STOP, code, f"rank {rank} left with exit code {code}")
    lost = [rank for rank, code in codes.items() if code is None]
    if lost:
        why = f"{len(lost)} of {len(codes)} processes left no exit code; were they killed, or their nodes lost?"
        return Outcome(AGAIN, PASSING[0], why, lost=True)
    failed = [rank for rank, code in codes.items() if code]
    if not failed:
        return Outcome(FINISHED, 0)
    rank = first if first in failed else failed[0]
    code = codes[rank] or 0
    return Outcome(AGAIN, code, f"rank {rank} failed first, with exit code {code}")


def is_passing(code: int) -> bool:
    """Whether a failure with this exit code may be gone by the next attempt."""
    return code < 0 or code > 128 or code in PASSING


class Attempts:
    """The attempts of one run."""

    def __init__(self, run_dir: str | Path, clock: Callable[[], float] = time.time) -> None:
        self.run_dir = Path(run_dir)
        self.path = self.run_dir / "launch" / "attempts.jsonl"
        self._clock = clock

    def events(self) -> list[dict[str, Any]]:
        """All notes in order; a torn line, as a killed writer leaves it, is passed over."""
        found = []
        for line in self.path.read_text(errors="replace").splitlines() if self.path.exists() else ():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and "event" in event:
                found.append(event)
        return found

    def note(self, event: str, **fields: Any) -> None:
        """Append one note, on disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"time": round(self._clock(), 3), "event": event, **fields}) + "\n"
        with open(self.path, "a") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def since_submitted(self) -> list[dict[str, Any]]:
        """Notes since a person last acted."""
        events = self.events()
        starts = [at for at, event in enumerate(events) if event["event"] == "submitted"]
        return events[starts[-1] :] if starts else events

    def begin(self, job: str, limits: Limits) -> Decision:
        """Before the first attempt of a job: whether the run is over already, and what became of a former job.

        An attempt of this very job without an end died with its node; SLURM has put the job back into the queue. A job
        that nobody noted was submitted by hand.
        """
        events = self.since_submitted()
        if not any(job in (event.get("job"), *event.get("jobs", ())) for event in events):
            self.note("submitted", launcher="slurm", jobs=[job])
            return Decision(AGAIN, 0, "")
        ends = [event for event in events if event["event"] == "end"]
        if ends and ends[-1]["verdict"] == FINISHED:
            return Decision(FINISHED, 0, "the run is finished")
        if ends and ends[-1]["verdict"] in (STOP, GIVE_UP):
            why = f"an earlier job ended the run ({ends[-1]['why']}); launch it again to go on"
            return Decision(STOP, ends[-1]["code"], why)
        if any(event["event"] == "cancel" for event in events):
            return Decision(STOP, PASSING[0], "cancelled; launch it again to go on")
        if open_attempt(events) is None:
            return Decision(AGAIN, 0, "")
        return self.end(Outcome(AGAIN, PASSING[0], "the attempt was cut off: a node was lost", lost=True), limits, job)

    def start(self, launcher: str, job: str, nodes: Iterable[str], processes: int) -> int:
        """Note that an attempt begins; returns its number, from 1."""
        number = 1 + sum(event["event"] == "start" for event in self.events())
        self.note(
            "start",
            attempt=number,
            launcher=launcher,
            job=job,
            nodes=list(nodes),
            processes=processes,
            checkpoint=newest_checkpoint(self.run_dir),
            metrics=_metrics_mark(self.run_dir),
        )
        return number

    def end(self, outcome: Outcome, limits: Limits, job: str, saved: bool = False) -> Decision:
        """Note how the attempt ended and decide. `saved`: it had been asked to save and leave."""
        events = self.since_submitted()
        begun = open_attempt(events) or {}
        checkpoint = newest_checkpoint(self.run_dir)
        # srun ends the others when the first process leaves; one that was slow to leave has no exit code then.
        newer = checkpoint > begun.get("checkpoint", checkpoint)
        failure = {
            "verdict": outcome.verdict,
            "code": outcome.code,
            "why": outcome.why,
            "lost": outcome.lost,
            "step": _step_of(begun, self.run_dir),
            "checkpoint": checkpoint,
        }
        if outcome.verdict == AGAIN and any(event["event"] == "cancel" for event in events):
            decision = Decision(STOP, outcome.code, f"cancelled; the newest checkpoint is of step {checkpoint}")
        elif outcome.verdict == AGAIN and saved and outcome.code == PASSING[0] and (not outcome.lost or newer):
            decision = Decision(SAVED, PASSING[0], f"saved at step {checkpoint}")
        elif outcome.verdict == AGAIN:
            decision = decide([event for event in events if event["event"] == "end"], failure, limits)
        else:
            decision = Decision(outcome.verdict, outcome.code, outcome.why)
        why = decision.why if decision.verdict in (STOP, GIVE_UP, SAVED) else outcome.why
        own = {"verdict": decision.verdict, "why": why}
        self.note("end", attempt=begun.get("attempt"), job=job, **failure | own)
        return decision


def open_attempt(events: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The start of the attempt that has not ended."""
    last = [event for event in events if event["event"] in ("start", "end")][-1:]
    return last[0] if last and last[0]["event"] == "start" else None


def decide(ends: list[dict[str, Any]], failure: Mapping[str, Any], limits: Limits) -> Decision:
    """Whether a run that failed is tried again, by how its attempts ended before.

    Given up: more than `max_failures` in a row without a new checkpoint; or `max_same_step` after the very same step.
    A code that promises nothing (a traceback, 1) counts as "the same step" also before the first step, so that a
    mistake in the code is tried twice, and a machine that broke once does not end a run.
    """
    in_a_row, same = 1, 1
    for end in reversed(ends):
        if end["verdict"] != AGAIN or end["checkpoint"] != failure["checkpoint"]:
            break
        in_a_row += 1
    placed = failure["step"] is not None or not is_passing(failure["code"])
    for end in reversed(ends):
        if not placed or end["verdict"] != AGAIN or end["lost"] or end["step"] != failure["step"]:
            break
        if failure["step"] is None and is_passing(end["code"]):
            break
        same += 1
    code, why = failure["code"], failure["why"]
    if not failure["lost"] and placed and same >= limits.max_same_step:
        where = "before the first step" if failure["step"] is None else f"after step {failure['step']}"
        return Decision(GIVE_UP, code, f"{why}; failed {same} times {where}; giving up")
    if in_a_row > limits.max_failures:
        return Decision(GIVE_UP, code, f"{why}; failed {in_a_row} times without a new checkpoint; giving up")
    return Decision(AGAIN, code, f"{why}; failure {in_a_row} without a new checkpoint", pause_after(in_a_row))


def pause_after(failures: int) -> float:
    """Seconds to wait after so many failures in a row: 1, 2, 4, ... up to 60."""
    return min(LONGEST_PAUSE_S, 2.0 ** (failures - 1))


def newest_checkpoint(run_dir: Path) -> int:
    """Highest step among the run's complete checkpoints; -1 without one."""
    folder = run_dir / "checkpoints"
    names = os.listdir(folder) if folder.is_dir() else []
    return max((int(match[1]) for name in names if (match := re.search(r"(\d+)$", name))), default=-1)


def last_step(run_dir: Path) -> int | None:
    """Number of the last training step in `metrics.jsonl`, which rank 0 writes after each; None without one."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return None
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 18)))  # records are some 2 kB, with dynamics some 30 kB
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            continue  # torn, or cut by the seek
        if "loss" in record:
            return int(record["step"])
    return None


def _step_of(begun: Mapping[str, Any], run_dir: Path) -> int | None:
    """The last step that the attempt did itself; None when it did none, or its start is not known."""
    step = last_step(run_dir)
    if step is None or "metrics" not in begun or begun["metrics"] == _metrics_mark(run_dir):
        return None
    return step if step >= begun["checkpoint"] else None  # fewer: only what a resume superseded was cut off


def _metrics_mark(run_dir: Path) -> list[int]:
    """Tells whether `metrics.jsonl` was written since; nodes' clocks need not agree with the file server's."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return [0, 0]
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]
