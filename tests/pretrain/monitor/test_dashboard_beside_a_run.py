"""`monitor.dashboard: true`: the page is there while the run trains, and gone with it, also when the run is killed."""

import contextlib
import http.client
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import child_process
import pytest

from headrace.errors import ConfigError
from pretrain.config import MonitorConfig
from pretrain.monitor.serve import beside_run


def port_in(log: Path) -> int | None:
    text = log.read_text() if log.exists() else ""
    return int(text.split("127.0.0.1:")[1].split("/")[0]) if "127.0.0.1:" in text and text.endswith("\n") else None


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.suppress(OSError):
        connection.request("GET", "/api/session")
        return connection.getresponse().status == 200
    return False


@pytest.mark.parametrize("end", ["run ends", "run is killed"])
def test_it_lives_as_long_as_the_run(tmp_path: Path, end: str) -> None:
    pytest.importorskip("uvicorn")
    config = MonitorConfig(dashboard=True, port=0)
    over = tmp_path / "over"

    def run() -> None:
        with beside_run(config, tmp_path, print):
            until(over.exists)

    pid = child_process.start(run, tmp_path / "run.log")
    until(lambda: port_in(tmp_path / "log" / "dashboard.log"))
    port = port_in(tmp_path / "log" / "dashboard.log")
    assert port is not None
    assert answers(port)
    if end == "run ends":
        over.touch()
        assert child_process.wait(pid) == 0
        assert not answers(port)
    else:
        os.kill(pid, signal.SIGKILL)
        child_process.wait(pid)
        until(lambda: not answers(port))


def test_a_port_in_use_does_not_stop_the_run(tmp_path: Path) -> None:
    said: list[str] = []
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = MonitorConfig(dashboard=True, port=taken.getsockname()[1])
        with beside_run(config, tmp_path, said.append):
            pass
    assert len(said) == 1
    assert "cannot listen" in said[0]


def test_a_token_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("0123456789abcdef\n")
    file.chmod(0o644)
    config = MonitorConfig(dashboard=True, address="0.0.0.0", token_file=str(file))
    with pytest.raises(ConfigError, match="chmod 600"), beside_run(config, tmp_path, print):
        pass


def test_an_open_address_needs_a_token() -> None:
    with pytest.raises(ValueError, match="token_file"):
        MonitorConfig(dashboard=True, address="0.0.0.0")


def test_missing_packages_do_not_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with beside_run(MonitorConfig(dashboard=True, port=0), tmp_path, said.append):
        pass
    assert ["headrace[dashboard]" in line for line in said] == [True]
