"""Run a function in a forked child: real processes that can really be killed, without paying for imports again."""

import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from headrace.errors import HeadraceError


def start(function: Callable[[], int | None], log: Path | None = None) -> int:
    """Fork a child that runs `function` and leaves with its return value; returns the child's process id."""
    sys.stdout.flush()
    # A closed process group that a child collected would wait for threads that only its parent has.
    gc.collect()
    gc.freeze()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if log is not None:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            # pytest has put its own objects where these were.
            sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
        code = int(function() or 0)
    except HeadraceError as error:
        sys.stderr.write(f"headrace: error: {error}\n")
        code = int(error.exit_code)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int, timeout_s: float = 300.0) -> int:
    """The child's exit code, -N when signal N ended it; a child that outlives the timeout is killed."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"child still ran after {timeout_s} s")


def run(function: Callable[[], int | None], log: Path | None = None) -> int:
    """Run `function` in a child to its end; returns the exit code."""
    return wait(start(function, log))
