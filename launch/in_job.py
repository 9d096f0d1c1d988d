"""What the job script asks between its steps: `python3 in_job.py VERB`, answered as shell assignments.

    begin                       VERDICT: again (go), finished, stop, give-up
    usable                      NODES, NUM_NODES: nodes of the allocation that SLURM does not think ill of
    choose FOLDER               NODES, NUM_NODES, BAD, WHY: which nodes to use, by the checks in FOLDER; or as `end`,
                                where it is no node's fault
    start NODES NUM_NODES       the attempt is noted
    end PROCESSES [saved]       VERDICT, CODE, WHY, PAUSE: by the exit codes that the processes left
    resubmitted ID              another job goes on in this one's place

All else comes from the job script's environment: RUN_DIR, LOG_DIR, SNAPSHOT, JOB, TASKS_PER_NODE, NODE_COUNTS,
MAX_FAILURES, MAX_SAME_STEP. Like `attempts.py` this runs on compute nodes with the system's `python3`, 3.9 or newer.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

if __name__ == "__main__":  # run by its path: Python then looks beside the file, where our site.py is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.attempts import STOP, Attempts, Decision, Limits, Outcome, judge, open_attempt
from launch.nodes import choose_nodes, fault_of_the_run, is_usable, read_checks

Answer = Mapping[str, object]


def begin(job: Job) -> Answer:
    """Whether this job has anything to do. Two jobs in one run folder would destroy the run."""
    other = open_attempt(job.attempts.events())
    if other is not None and other["job"] != job.id and _runs(other["job"]):
        return _decision(Decision(STOP, 2, f"job {other['job']} trains this run already"))
    return _decision(job.attempts.begin(job.id, job.limits))


def usable(job: Job) -> Answer:
    """The nodes to ask."""
    states = job.nodes()
    good = [node for node, state in states.items() if is_usable(state)]
    return {"NODES": ",".join(good), "NUM_NODES": len(good)}


def choose(job: Job, folder: str) -> Answer:
    """The nodes to run on."""
    limits = json.loads((job.snapshot / "checks.json").read_text())
    checks = read_checks(Path(folder))
    choice = choose_nodes(job.nodes(), checks, job.node_counts, limits)
    if not choice.use:
        noted = [event for event in job.attempts.since_submitted() if event["event"] == "bad_node"]
        if fault := fault_of_the_run(checks or {}, {event["node"]: event["why"] for event in noted}):
            return _decision(job.attempts.end(Outcome(STOP, 2, fault), job.limits, job.id))
    for node, why in choice.bad.items():
        job.attempts.note("bad_node", job=job.id, node=node, why=why)
    return {
        "NODES": ",".join(choice.use),
        "NUM_NODES": len(choice.use),
        "BAD": ",".join(choice.bad),
        "WHY": "; ".join(f"{node}: {why}" for node, why in choice.bad.items()),
    }


def start(job: Job, nodes: str, count: str) -> Answer:
    """Note that an attempt begins."""
    return {"ATTEMPT": job.attempts.start("slurm", job.id, nodes.split(","), int(count) * job.tasks_per_node)}


def end(job: Job, world_size: str, saved: str = "") -> Answer:
    """Judge the attempt by the notes its processes left."""
    codes = {rank: _number(job.log_dir / f"exit-{rank}") for rank in range(int(world_size))}
    first = _number(job.log_dir / "first-failure")
    return _decision(job.attempts.end(judge(codes, first), job.limits, job.id, saved == "saved"))


def resubmitted(job: Job, number: str) -> Answer:
    """Where the run goes on."""
    job.attempts.note("resubmitted", job=number, instead_of=job.id)
    return {}


class Job:
    """The job script's environment."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.id = environment["JOB"]
        self.snapshot = Path(environment["SNAPSHOT"])
        self.log_dir = Path(environment["LOG_DIR"])
        self.tasks_per_node = int(environment["TASKS_PER_NODE"])
        self.node_counts = [int(number) for number in environment["NODE_COUNTS"].split()]
        self.limits = Limits(int(environment["MAX_FAILURES"]), int(environment["MAX_SAME_STEP"]))
        self.attempts = Attempts(environment["RUN_DIR"])
        self.nodelist = environment["SLURM_JOB_NODELIST"]

    def nodes(self) -> dict[str, str]:
        """State of each node of the allocation, such as `allocated`, `mixed` or `down*`."""
        names = _output(["scontrol", "show", "hostnames", self.nodelist]).split()
        states = dict.fromkeys(names, "unknown")
        for line in _output(["sinfo", "-h", "-N", "-n", self.nodelist, "-o", "%N %T"]).splitlines():
            name, _, state = line.partition(" ")
            if name in states:
                states[name] = state.strip()
        return states


def _decision(decision: Decision) -> Answer:
    seconds = f"{decision.pause_s:g}"
    return {"VERDICT": decision.verdict, "CODE": decision.code, "WHY": decision.why, "PAUSE": seconds}


def _number(path: Path) -> int | None:
    """The whole number that a file begins with; None without one."""
    try:
        found = re.match(r"-?\d+", path.read_text())
    except OSError:
        return None
    return int(found[0]) if found else None


def _runs(number: str) -> bool:
    """Whether SLURM runs a job; not one of another launcher, whose numbers have a host."""
    return number.isdecimal() and _output(["squeue", "-h", "-j", number, "-o", "%T"]).strip() == "RUNNING"


def _output(command: list[str]) -> str:
    try:
        answer = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
    except OSError:
        return ""
    return answer.stdout


def main(words: list[str]) -> None:
    """Answer one question of the job script."""
    verbs: tuple[Callable[..., Answer], ...] = (begin, usable, choose, start, end, resubmitted)
    verb = {function.__name__: function for function in verbs}[words[0]]
    answer = verb(Job(os.environ), *words[1:])
    for name, value in answer.items():
        print(f"{name}={shlex.quote(str(value))}")


if __name__ == "__main__":
    main(sys.argv[1:])
