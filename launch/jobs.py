"""What became of a launched run, from its folder and SLURM's queue: `headrace launch status`, `cancel`, `attach`."""

import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.errors import ConfigError
from headrace.yaml_file import read_yaml
from launch.attempts import GIVE_UP, PASSING, SAVED, STOP, Attempts, last_step, newest_checkpoint, open_attempt


@dataclass(frozen=True)
class QueueEntry:
    """One job as SLURM sees it."""

    job: str
    state: str
    """Such as RUNNING or PENDING."""
    reason: str
    nodes: str
    elapsed: str


@dataclass(frozen=True)
class RunStatus:
    """A run as it stands."""

    run_dir: Path
    word: str
    """running, waiting, finished, stopped, given up, not started."""
    exit_code: int
    """0 unless the run was ended by a failure; then its exit code."""
    step: int | None
    """Last training step done."""
    steps: int | None
    """Of how many."""
    checkpoint: int
    events: list[dict[str, Any]]
    queue: list[QueueEntry]


def launched(run_dir: Path) -> Attempts:
    """The notes of a run that was launched. Raises ConfigError."""
    attempts = Attempts(run_dir)
    if not attempts.path.exists():
        raise ConfigError(f"{run_dir}: nothing was launched there; it has no launch/attempts.jsonl")
    return attempts


def is_sweep(folder: Path) -> bool:
    """Whether a folder holds the runs of a sweep."""
    return (folder / "sweep.json").exists()


def sweep_runs(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """(folder, settings) of every run of a sweep."""
    table = json.loads((folder / "sweep.json").read_text())
    return [(folder / row["run"], {key: value for key, value in row.items() if key != "run"}) for row in table]


def job_ids(run_dir: Path) -> list[str]:
    """SLURM's jobs of the last launch, those that took the place of another one included."""
    events = Attempts(run_dir).since_submitted()
    ids = [job for event in events for job in (*event.get("jobs", ()), event.get("job"))]
    snapshots = sorted(path for path in (run_dir / "launch").glob("[0-9]*/job-id"))
    submitted = snapshots[-1].read_text().split() if snapshots else []
    return [job for job in dict.fromkeys([*submitted, *ids]) if job and job.isdecimal()]


def queue_of(jobs: list[str]) -> list[QueueEntry]:
    """Those of `jobs` that SLURM still has; nothing where SLURM is not."""
    return [QueueEntry(job, *rest) for job, array, *rest in _queue() or () if job in jobs or array in jobs]


def _queue() -> list[list[str]] | None:
    """All jobs of this user that SLURM has; None where it is not, or does not answer."""
    if shutil.which("squeue") is None:
        return None
    # One id that SLURM has forgotten makes it refuse all, so it is asked for everything of this user.
    command = ["squeue", "-h", "-r", "--me", "-o", "%A|%F|%T|%r|%N|%M"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if answer.returncode else [row.split("|") for row in answer.stdout.splitlines() if row.count("|") == 5]


def status_of(run_dir: Path) -> RunStatus:
    """How a run stands. Raises ConfigError."""
    attempts = launched(run_dir)
    events = attempts.since_submitted()
    queue = queue_of(job_ids(run_dir))
    ends = [event for event in events if event["event"] == "end"]
    verdict = ends[-1]["verdict"] if ends else ""
    begun, code = open_attempt(events), 0
    if begun is not None:
        word = "running"
        if queue and not any(entry.state in ("RUNNING", "COMPLETING") for entry in queue):
            word = "waiting"  # the queue has it again; nobody could note the end
        elif not queue and _is_gone(begun["job"]):
            word, code = "stopped", PASSING[0]  # killed with whoever could have noted it
    elif verdict in (STOP, GIVE_UP):
        word = {STOP: "stopped", GIVE_UP: "given up"}[verdict]
    elif verdict == "finished":
        word = "finished"
    else:
        word = "waiting" if ends else "not started"
    if begun is None and word in ("stopped", "given up"):
        code = int(ends[-1]["code"])
    return RunStatus(
        run_dir, word, code, last_step(run_dir), _steps(run_dir), newest_checkpoint(run_dir), attempts.events(), queue
    )


def _steps(run_dir: Path) -> int | None:
    path = run_dir / "config.yaml"
    if not path.exists():
        return None
    config = read_yaml(path).data
    train = config.get("train") if isinstance(config, dict) else None
    return train.get("steps") if isinstance(train, dict) else None


def as_text(status: RunStatus) -> str:
    """The status in some lines."""
    done = "no step yet" if status.step is None else f"{status.step + 1} of {status.steps or '?'} steps"
    kept = "no checkpoint" if status.checkpoint < 0 else f"checkpoint {status.checkpoint}"
    lines = [f"{status.run_dir}: {status.word}, {done}, {kept}"]
    for entry in status.queue:
        where = f"on {entry.nodes} for {entry.elapsed}" if entry.nodes else f"because {entry.reason}"
        lines.append(f"  job {entry.job}: {entry.state} {where}")
    for event in status.events:
        if event["event"] == "start":
            begun = "" if event["checkpoint"] < 0 else f" from checkpoint {event['checkpoint']}"
            where = f"{event['processes']} processes on {','.join(event['nodes'])}"
            lines.append(f"  attempt {event['attempt']} ({event['launcher']} {event['job']}): {where}{begun}")
        elif event["event"] == "end":
            lines.append(f"    {as_words(event)}")
        elif event["event"] == "bad_node":
            lines.append(f"  bad node {event['node']}: {event['why']}")
        elif event["event"] == "resubmitted":
            lines.append(f"  job {event['job']} in place of {event['instead_of']}")
        elif event["event"] == "cancel":
            lines.append("  asked to save and end")
    return "\n".join(lines)


def as_words(end: Mapping[str, Any]) -> str:
    """How an attempt ended: the verdict, and why where there is a reason."""
    if end["verdict"] == SAVED:
        return str(end["why"])
    return f"{end['verdict']}: {end['why']}" if end["why"] else str(end["verdict"])


def cancel(run_dir: Path, now: bool) -> str:
    """End a run, after it has saved unless `now`; what was done. Raises ConfigError."""
    runs = [folder for folder, _ in sweep_runs(run_dir)] if is_sweep(run_dir) else [run_dir]
    jobs = job_ids(run_dir) if is_sweep(run_dir) else []
    for run in runs:
        if not is_sweep(run_dir) or Attempts(run).path.exists():
            launched(run).note("cancel")
            jobs += job_ids(run)
    own = [int(job.rpartition(":")[2]) for run in runs if (job := _process(run))]
    for pid in own:
        os.kill(pid, signal.SIGKILL if now else signal.SIGTERM)
    queue = queue_of(jobs)
    if not queue and not own:
        pausing = any(_launcher(run) for run in runs)
        return "it pauses; there will be no other attempt" if pausing else "nothing of it runs or waits"
    # Tasks of an array that wait are all called by the array's number, as one of those that run may be.
    waiting = list(dict.fromkeys(entry.job for entry in queue if entry.state == "PENDING"))
    running = list(dict.fromkeys(entry.job for entry in queue if entry.state not in ("PENDING", "COMPLETING")))
    if waiting:
        _slurm(["scancel", "--state=PENDING", *waiting])
    if running and now:
        _slurm(["scancel", *running])
    elif running:
        _slurm(["scancel", "--batch", "--signal=USR1", *running])
    return f"asked to end {'at once' if now else 'after saving'}: {' '.join([*running, *waiting, *map(str, own)])}"


def _process(run_dir: Path) -> str:
    """`host:pid` of a launcher of ours that has processes on this machine; empty without one."""
    begun = open_attempt(Attempts(run_dir).since_submitted())
    return begun["job"] if begun is not None and _lives_here(begun["job"]) else ""


def _launcher(run_dir: Path) -> str:
    """`host:pid` of a launcher of ours on this machine, also between two attempts; empty without one."""
    jobs = [job for event in Attempts(run_dir).since_submitted() for job in event.get("jobs", ())]
    return next((job for job in jobs if _lives_here(job)), "")


def _is_gone(job: str) -> bool:
    """Whether it is certain that nothing of an attempt is left: `job` is SLURM's number, which it has forgotten, or
    `host:pid` of a launcher."""
    if job.isdecimal():
        queue = _queue()
        return queue is not None and not any(job in row[:2] for row in queue)
    return job.startswith(socket.gethostname() + ":") and not _lives_here(job)


def _lives_here(job: str) -> bool:
    """Whether `job` is `host:pid` of a launcher that runs here; its number may be another process's by now."""
    host, _, pid = job.rpartition(":")
    if host != socket.gethostname():
        return False
    try:
        return b"launch" in Path(f"/proc/{pid}/cmdline").read_bytes() or int(pid) == os.getpid()
    except (OSError, ValueError):
        return False


def attach_command(run_dir: Path, node: str) -> list[str]:
    """A shell inside the running job, on its first node or on `node`. Raises ConfigError."""
    launched(run_dir)
    running = [entry for entry in queue_of(job_ids(run_dir)) if entry.state == "RUNNING"]
    if not running:
        raise ConfigError(f"{run_dir}: no job of it runs now; see `headrace launch status {run_dir}`")
    where = [f"--nodelist={node}"] if node else []
    return ["srun", f"--jobid={running[0].job}", "--overlap", "--nodes=1", "--ntasks=1", *where, "--pty", "bash", "-l"]


def _slurm(command: list[str]) -> None:
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise ConfigError(f"{command[0]}: {' '.join(answer.stderr.split())}")
