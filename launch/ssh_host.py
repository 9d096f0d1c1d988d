"""One host's part of `headrace launch ssh`: `python -m launch.ssh_host NUMBER SLOTS RUN_DIR train CONFIG ...`.

Starts SLOTS processes with their ranks and sees them to their end. Standard input brings names of signals to pass on;
its end means that whoever started us is gone, and ends the processes too.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from pretrain.processes import start_processes

SAVE_S = 60.0
"""What processes whose launcher is gone get to save and leave."""


def listen() -> None:
    """Turn words of standard input into signals to ourselves, which `start_processes` passes on."""
    time_to_save = SAVE_S
    for line in sys.stdin:
        number = signal.Signals[line.strip()]
        if number == signal.SIGKILL:
            time_to_save = 0.0
            break
        os.kill(os.getpid(), number)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(time_to_save)
    os.kill(os.getpid(), signal.SIGTERM)  # the second one makes `start_processes` kill what is left


def main(number: str, slots: str, run_dir: str, *words: str) -> int:
    """The exit code of this host's processes; 128+N where signal N ended the first that failed."""
    threading.Thread(target=listen, daemon=True).start()
    command = [sys.executable, "-m", "pretrain", *words]
    shared = {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE")}
    code = start_processes(command, int(slots), shared, Path(run_dir) / "log", first_rank=int(number) * int(slots))
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
