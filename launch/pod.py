"""One pod's part of a run on Kubernetes: `python -m launch.pod PROCESSES RUN_DIR train CONFIG`.

The pod's number comes from RANK (PyTorchJob) or JOB_COMPLETION_INDEX (JobSet), the number of pods from WORLD_SIZE. Exit
codes of failures that may pass become 128 and above, which is what PyTorchJob's `restartPolicy: ExitCode` tries again:
4 becomes 132, 5 becomes 133.
"""

import os
import sys
from pathlib import Path

from headrace.errors import ConfigError
from launch.attempts import is_passing
from pretrain.processes import start_processes

RETRY = 128


def main(processes: str, run_dir: str, *words: str) -> int:
    """The exit code of this pod's processes."""
    number, pods = _place()
    command = [sys.executable, "-m", "pretrain", *words]
    shared = {"WORLD_SIZE": str(pods * int(processes))}
    shared |= {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in os.environ}
    code = start_processes(command, int(processes), shared, Path(run_dir) / "log", first_rank=number * int(processes))
    return exit_code(code)


def exit_code(code: int) -> int:
    """A process's exit code (-N: signal N) as Kubernetes is to see it."""
    if code < 0:
        return RETRY - code
    return RETRY + code if is_passing(code) and code < RETRY else code


def _place() -> tuple[int, int]:
    """This pod's number and how many there are."""
    number = os.environ.get("RANK", os.environ.get("JOB_COMPLETION_INDEX"))
    if number is None or "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            "launch.pod: RANK or JOB_COMPLETION_INDEX, and WORLD_SIZE, are not set; start it as a PyTorchJob or JobSet"
        )
    return int(number), int(os.environ["WORLD_SIZE"])


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except ConfigError as error:
        sys.stderr.write(f"headrace: error: {error}\n")
        sys.exit(int(error.exit_code))
