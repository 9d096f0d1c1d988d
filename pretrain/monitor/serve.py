"""The dashboard as a process: in the foreground (`headrace dashboard`), or beside a run (`monitor.dashboard: true`)."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from headrace.errors import ConfigError
from pretrain.monitor.access import check_address

TOKEN_VARIABLE: Final = "HEADRACE_DASHBOARD_TOKEN"
IDLE: Final = 19
"""Niceness beside a run: viewers get what training leaves."""
_INSTALL: Final = "the dashboard needs starlette and uvicorn; pip install 'headrace[dashboard]'"


def serve(root: Path, host: str, port: int, token: str, say: Callable[[str], None]) -> None:
    """Show the runs below `root` until interrupted; `say` gets the page's address once it can be opened.

    Raises ConfigError for a folder or an address that cannot be used, and when the packages are missing.
    """
    check_address(host, token)
    try:
        import uvicorn

        from pretrain.monitor.app import make_app
        from pretrain.monitor.runs import Runs
    except ImportError:
        raise ConfigError(_INSTALL) from None
    app = make_app(Runs(root), token)
    listener = listen(host, port)
    name, number = listener.getsockname()[:2]
    say(f"http://{f'[{name}]' if ':' in name else name}:{number}/")
    config = uvicorn.Config(
        app, log_level="error", access_log=False, server_header=False, date_header=False, lifespan="off",
        timeout_keep_alive=15, timeout_graceful_shutdown=1, limit_concurrency=1000, backlog=256,
    )  # fmt: skip
    uvicorn.Server(config).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises ConfigError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(256)
    except (OSError, UnicodeError, OverflowError) as error:
        raise ConfigError(
            f"dashboard: cannot listen on {host} port {port} ({getattr(error, 'strerror', None) or error}); choose "
            "another address or port (0 takes a free one)"
        ) from None
    return listener


def stay_beside(parent: int) -> None:
    """Be of little weight to the machine, and end when the process `parent` has: a killed run must leave nobody
    behind."""
    os.nice(IDLE)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(0)

    threading.Thread(target=watch, name="parent", daemon=True).start()


class BesideRun:
    """A dashboard of one run, in a process of its own that ends with the run."""

    def __init__(self, run_dir: Path, host: str, port: int, token: str) -> None:
        """Raises ConfigError for an address that cannot be used."""
        check_address(host, token)
        listen(host, port).close()
        log = run_dir / "log"
        log.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pretrain", "dashboard", str(run_dir), "--host", host, "--port", str(port)]
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        with (log / "dashboard.log").open("wb") as output:
            self._process = subprocess.Popen(
                [*command, "--beside", str(os.getpid())],
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                env=environment | {TOKEN_VARIABLE: token},
                start_new_session=True,  # Ctrl-C is for the run, which ends the dashboard when it has saved
            )

    def close(self) -> None:
        """End it."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
