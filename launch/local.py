"""`headrace launch local`: N processes on this machine, started again when that can help."""

import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from headrace.errors import ConfigError, ExitCode
from launch.preflight import checked_config
from pretrain.processes import StopRequest, start_processes

LONGEST_PAUSE_S = 60.0


def launch_local(config_path: str | Path, overrides: Sequence[str], nproc: int, max_restarts: int) -> int:
    """Train here with `nproc` processes; the exit code of the last attempt. Raises ConfigError, LayoutError."""
    if nproc < 1:
        raise ConfigError(f"--nproc: at least 1, got {nproc}")
    if max_restarts < 0:
        raise ConfigError(f"--max-restarts: at least 0, got {max_restarts}")
    config = checked_config(config_path, overrides, nproc)
    run_dir = Path(config.run.dir)
    command = [sys.executable, "-m", "pretrain", "train", str(config_path), *overrides]
    return run_with_restarts(command, nproc, run_dir, max_restarts)


def run_with_restarts(
    command: list[str],
    nproc: int,
    run_dir: Path,
    max_restarts: int,
    grace_s: float = 10.0,
    pause: Callable[[float], None] = time.sleep,
) -> int:
    """`command` in `nproc` processes, up to `max_restarts` times again without a new checkpoint in between.

    Pauses 1, 2, 4, ... up to 60 seconds before each restart: a full disk or a lost network gets time to come back.
    """
    failures, checkpoint = 0, newest_checkpoint(run_dir)
    while True:
        stop = StopRequest()
        code = start_processes(command, nproc, {}, run_dir / "log", grace_s, stop)
        if stop.asked or not can_help(code):
            return code
        reached = newest_checkpoint(run_dir)
        failures = 1 if reached > checkpoint else failures + 1
        checkpoint = reached
        if failures > max_restarts:
            sys.stderr.write(f"headrace: failed {failures} times without a new checkpoint; giving up\n")
            return code
        seconds = min(LONGEST_PAUSE_S, 2.0 ** (failures - 1))
        sys.stderr.write(f"headrace: restart {failures} of {max_restarts} in {seconds:.0f} s\n")
        sys.stderr.flush()
        pause(seconds)


def can_help(code: int) -> bool:
    """Whether running again may end better: a recoverable failure, the watchdog, or a signal."""
    return code < 0 or code in (ExitCode.RECOVERABLE, ExitCode.WATCHDOG)


def newest_checkpoint(run_dir: Path) -> int:
    """Highest step among the run's checkpoints; -1 without one."""
    folder = run_dir / "checkpoints"
    names = os.listdir(folder) if folder.is_dir() else []
    return max((int(match[1]) for name in names if (match := re.search(r"(\d+)$", name))), default=-1)
