"""A real Prometheus scrapes a real run, and answers every query of the dashboards and every alert."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import child_process
import pytest
import yaml
from small_run import maker
from test_dashboards import ALERTS, NAMES, expressions
from wandb_file import read_wandb_file

from data_scheduler import DataConfig
from headrace.errors import ExitCode
from pretrain.metrics import read_records
from pretrain.train import train

pytestmark = pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")
PATIENCE_S = 180.0
NOT_IN_THIS_RUN = (
    "mtp_loss",
    "loss_scale",
    "trained_tokens",
    "batch_documents",
    "trained_documents",
    "slowest_rank",
    "slowest_rank_ratio",
)
"""Names of panels whose metric needs multi-token heads, fp16, a selection, or several ranks."""


def eventually(ask: Callable[[], Any], what: str) -> Any:
    """The first answer that is not empty."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        answer = ask()
        if answer:
            return answer
        time.sleep(0.2)
    raise AssertionError(f"waited in vain for {what}")


@dataclass
class Training:
    """A run that trains until it is told to stop."""

    folder: Path
    pid: int
    port: int
    log: Path

    def stop(self) -> int:
        """What SLURM sends before the time limit; the exit code."""
        pid, self.pid = self.pid, 0
        os.kill(pid, signal.SIGUSR1)
        return child_process.wait(pid)


@pytest.fixture(scope="module")
def run(data_config: Callable[..., DataConfig], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Training]:
    """A run with every tracker that is installed, and a hook."""
    root = tmp_path_factory.mktemp("scraped")
    metrics = {
        "progress": False,
        "prometheus": {"enabled": True, "port": 0},
        "wandb": {"enabled": find_spec("wandb") is not None},
        "dynamics": {"every": 1},
        "peak_flops": 1e12,
        "ranks_every": 1,
    }
    hook = {"kind": "command", "command": ["tee", "-a", str(root / "told")], "events": ["run_stopped", "run_failed"]}
    make = maker(data_config, root)
    config = make("run", train__steps=10**6, metrics=metrics, alerts={"hooks": [hook], "linger_s": PATIENCE_S})
    pid = child_process.start(lambda: train(config), root / "run.log")
    port = root / "run" / "log" / "prometheus.port"
    try:
        eventually(port.exists, "the endpoint's port")
        training = Training(root / "run", pid, int(port.read_text()), root / "run.log")
        yield training
        pid = training.pid
    finally:
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@pytest.fixture(scope="module")
def prometheus(run: Training, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Asks the HTTP interface of a Prometheus that scrapes `run`."""
    folder = tmp_path_factory.mktemp("prometheus")
    target = {"targets": [f"127.0.0.1:{run.port}"]}
    (folder / "prometheus.yml").write_text(
        yaml.safe_dump(
            {
                "global": {"scrape_interval": "200ms", "evaluation_interval": "200ms"},
                "rule_files": [str(ALERTS)],
                "scrape_configs": [{"job_name": "headrace", "static_configs": [target]}],
            }
        )
    )
    with socket.socket() as taken:  # Prometheus does not tell which port it got for 0
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder}/prometheus.yml",
                f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address={address}",
            ],
            stdout=log,
            stderr=log,
        )

    def ask(path: str, **parameters: str) -> Any:
        url = f"http://{address}{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            if error.code == 503:  # it starts
                return None
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None
        except OSError:
            assert server.poll() is None, (folder / "log").read_text()
            return None  # it does not listen yet

    try:
        yield ask
    finally:
        server.kill()
        server.wait()


def test_every_panel_has_an_answer(prometheus: Callable[..., Any]) -> None:
    def steps() -> bool:
        found = prometheus("/api/v1/query", query="headrace_step > 3 and rate(headrace_tokens_total[1m]) > 0")
        return bool(found and found["result"])

    eventually(steps, "some steps, scraped twice")
    for name in NAMES:
        for panel, query in expressions(name):
            found = prometheus("/api/v1/query", query=query)["result"]
            if panel.split()[0] in NOT_IN_THIS_RUN:
                assert not found
            else:
                assert found, f"{name}, {panel}: {query} finds nothing"
                assert all(sample["metric"].get("run") in ("run", None) for sample in found)


def test_the_alerts_are_evaluated_and_none_fires_on_a_run_that_is_well(prometheus: Callable[..., Any]) -> None:
    def rules() -> list[dict[str, Any]]:
        found = prometheus("/api/v1/rules")
        return [rule for group in found["groups"] for rule in group["rules"]] if found else []

    found = eventually(lambda: all(rule["health"] == "ok" for rule in rules()) and rules(), "the alerts' evaluation")
    assert len(found) == len(yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"])
    # A machine of tests may well be short of disk, and its data loader busy; that is not the run's.
    firing = {rule["name"] for rule in found if rule["state"] == "firing"}
    assert firing <= {"HeadraceDiskFilling", "HeadraceDataWait"}


def test_a_signal_leaves_trackers_whole_and_is_told(run: Training) -> None:
    """Last: it ends the run."""
    assert run.stop() == ExitCode.RECOVERABLE, run.log.read_text()
    steps = {record["step"] for record in read_records(run.folder / "metrics.jsonl") if "loss" in record}
    assert not (run.folder / "log" / "prometheus.port").exists()
    if find_spec("wandb") is not None:
        (file,) = (run.folder / "log" / "wandb").glob("offline-run-*/*.wandb")
        _, history = read_wandb_file(file)
        assert {line["step"] for line in history if "train/loss" in line} == steps
    told = json.loads((run.folder.parent / "told").read_text())
    assert (told["event"], told["run"], told["step"]) == ("run_stopped", "run", max(steps) + 1)
