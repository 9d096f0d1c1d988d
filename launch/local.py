"""`headrace launch local`: N processes on this machine, started again when that can help."""

import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from headrace.errors import ConfigError
from launch.attempts import AGAIN, FINISHED, SAVED, Attempts, Limits, judge
from launch.preflight import checked_config
from pretrain.processes import StopRequest, start_processes


def launch_local(config_path: str | Path, overrides: Sequence[str], nproc: int, limits: Limits) -> int:
    """Train here with `nproc` processes; the exit code of the last attempt. Raises ConfigError, LayoutError."""
    if nproc < 1:
        raise ConfigError(f"--nproc: at least 1, got {nproc}")
    check_limits(limits)
    config = checked_config(config_path, overrides, nproc)
    run_dir = Path(config.run.dir)
    command = [sys.executable, "-m", "pretrain", "train", str(config_path), *overrides]

    def attempt(stop: StopRequest) -> int:
        return start_processes(command, nproc, {}, run_dir / "log", stop=stop)

    return run_with_restarts(attempt, Attempts(run_dir), "local", [socket.gethostname()], nproc, limits)


def check_limits(limits: Limits) -> None:
    """Raises ConfigError for limits that cannot be meant."""
    if limits.max_failures < 0:
        raise ConfigError(f"--max-failures: at least 0, got {limits.max_failures}")
    if limits.max_same_step < 1:
        raise ConfigError(f"--max-same-step: at least 1, got {limits.max_same_step}")


def run_with_restarts(
    attempt: Callable[[StopRequest], int],
    attempts: Attempts,
    launcher: str,
    nodes: Sequence[str],
    processes: int,
    limits: Limits,
    pause: Callable[[float], None] = time.sleep,
) -> int:
    """`attempt()`, which gives one exit code for all processes, again and again by the rule of `attempts.py`."""
    job = f"{socket.gethostname()}:{os.getpid()}"
    attempts.note("submitted", launcher=launcher, jobs=[job])
    while True:
        stop = StopRequest()
        attempts.start(launcher, job, nodes, processes)
        code = attempt(stop)
        decision = attempts.end(judge({0: code}, 0), limits, job, saved=stop.asked)
        if decision.verdict == FINISHED or stop.asked:
            return code
        if decision.verdict == SAVED or decision.verdict != AGAIN:
            sys.stderr.write(f"headrace: {decision.why}\n")
            return code
        sys.stderr.write(f"headrace: {decision.why}; again in {decision.pause_s:.0f} s\n")
        sys.stderr.flush()
        pause(decision.pause_s)
        if any(event["event"] == "cancel" for event in attempts.since_submitted()):
            sys.stderr.write("headrace: cancelled; launch it again to go on\n")
            return code
