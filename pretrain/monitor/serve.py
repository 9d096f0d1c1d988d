"""The dashboard as a process: in the foreground (`headrace dashboard`), or beside a run (`monitor.dashboard: true`)."""

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from headrace.errors import ConfigError
from pretrain.config import MonitorConfig
from pretrain.control.server import read_token
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


@contextlib.contextmanager
def beside_run(config: MonitorConfig, run_dir: Path, note: Callable[[str], None]) -> Iterator[None]:
    """With `monitor.dashboard`, a dashboard of the run while the block lasts; call on rank 0.

    One that cannot listen is left out with a note: nobody may be watching, and the run matters more. Raises ConfigError
    for a token file that cannot be used.
    """
    if not config.dashboard:
        yield
        return
    token = read_token(config.token_file) if config.token_file else ""
    try:
        process = _start(config, run_dir, token)
    except (ConfigError, OSError) as error:
        note(f"monitor.dashboard: {error}; the run goes on without it")
        yield
        return
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _start(config: MonitorConfig, run_dir: Path, token: str) -> "subprocess.Popen[bytes]":
    check_address(config.address, token)
    if not all(importlib.util.find_spec(name) for name in ("starlette", "uvicorn")):
        raise ConfigError(_INSTALL)
    listen(config.address, config.port).close()  # what is wrong with it is known now and not in a log
    command = [sys.executable, "-m", "pretrain", "dashboard", str(run_dir), "--host", config.address]
    (run_dir / "log").mkdir(parents=True, exist_ok=True)
    with (run_dir / "log" / "dashboard.log").open("wb") as output:
        return subprocess.Popen(
            [*command, "--port", str(config.port), "--beside", str(os.getpid())],
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            env=os.environ | {TOKEN_VARIABLE: token},
            start_new_session=True,  # Ctrl-C is for the run, which ends the dashboard when it has saved
        )
