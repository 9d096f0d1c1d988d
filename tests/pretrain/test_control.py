"""A live run obeys, answers, and does the same again: one process; see test_control_ranks.py for several."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import child_process
import orjson
import pytest
from small_corpus import jsonl, make_documents
from test_loop import Make, curve, maker, run_to_end
from typer.testing import CliRunner

from data_scheduler import DataConfig, Journal, batch_sha256
from data_scheduler.replay import replay
from headrace.errors import UnreachableError
from pretrain.cli import app
from pretrain.config import RunConfig
from pretrain.control.client import ByFile, ByHttp, Way, ask
from pretrain.loop import train

LONG = 100_000


@pytest.fixture
def run_config(data_config: Callable[..., DataConfig], tmp_path: Path) -> Make:
    return maker(data_config, tmp_path)


class Live:
    """A run in a child process, and what one asks of it."""

    def __init__(self, config: RunConfig) -> None:
        self.run_dir = Path(config.run.dir)
        self.log = self.run_dir.with_suffix(".log")
        self.pid = child_process.start(lambda: train(config), self.log)
        self._until((self.run_dir / "metrics.jsonl").exists)
        self.way: Way = ByFile(self.run_dir)

    def ask(self, command: str, why: str = "", **arguments: Any) -> dict[str, Any]:
        return ask(self.way, {"command": command, **arguments}, why, 60)

    def accepted(self, command: str, why: str = "", **arguments: Any) -> dict[str, Any]:
        answer = self.ask(command, why, **arguments)
        assert answer["status"] == "accepted", answer
        return answer

    def refused(self, command: str, **arguments: Any) -> str:
        before = len(self.journal())
        answer = self.ask(command, **arguments)
        assert answer["status"] == "refused", answer
        mine = [event for event in self.journal()[before:] if event.by.startswith("user:")]
        assert mine == []
        return str(answer["reason"])

    def journal(self) -> list[Any]:
        return Journal(self.run_dir / "journal.jsonl", writable=False).events

    def steps(self) -> int:
        return len((self.run_dir / "metrics.jsonl").read_bytes().splitlines())

    def until_step(self, step: int) -> None:
        self._until(lambda: self.steps() > step + 1)

    def end(self, code: int = 0) -> None:
        assert child_process.wait(self.pid) == code, self.log.read_text()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def _until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, self.log.read_text()
            assert os.waitpid(self.pid, os.WNOHANG) == (0, 0), self.log.read_text()
            time.sleep(0.01)


@pytest.fixture
def live(run_config: Make) -> Any:
    made: list[Live] = []

    def start(name: str = "run", **changes: Any) -> Live:
        changes = {"train__steps": LONG, "checkpoint__every": 0, **changes}
        made.append(Live(run_config(name, **changes)))
        return made[-1]

    yield start
    for run in made:
        try:
            run.kill()
        except (ProcessLookupError, ChildProcessError):
            pass


def test_all_commands_one_after_the_other(live: Any, tmp_path: Path, run_config: Make) -> None:
    run = live()
    status = run.ask("status")
    assert status["decided_by"] == "policy:static"
    mixed = run.accepted("set-mix", "d is best", weights={"d": 3, "a": 1})
    event = run.journal()[mixed["event"]]
    assert event.by.startswith("user:")
    assert "@" in event.by
    assert event.data["why"] == "d is best"
    assert event.data["weights"] == {"a": 0.25, "b": 0.0, "c": 0.0, "d": 0.75}
    slower = run.accepted("set-lr-scale", scale=0.5)
    run.accepted("set-eval-every", every=5)
    quarantined = run.accepted("quarantine", source="d")
    (tmp_path / "new.jsonl").write_bytes(jsonl(make_documents("new", 200, 0)))
    added = run.accepted("add-source", source={"name": "e", "paths": [str(tmp_path / "new.jsonl")], "weight": 0.5})
    run.accepted("save-now")
    ramp = run.accepted("set-mix", weights={"e": 1.0}, over=4)
    run.until_step(ramp["step"] + 6)
    run.accepted("undo", event=quarantined["event"])
    back = run.accepted("undo", event=ramp["event"])
    chosen = run.accepted("set-policy", kind="static")
    run.accepted("pause")
    before = run.steps()
    assert run.ask("status")["paused"]
    assert run.steps() <= before + 1
    assert "paused already" in run.refused("pause")
    run.accepted("resume")
    run.until_step(chosen["step"] + 6)
    run.accepted("stop-at", at="+5")
    run.end()
    events = run.journal()
    assert events[-1].kind == "checkpoint"
    records = {record["step"]: record for record in curve(run_config("run")) if "loss" in record}
    given = {step: set(record["source_tokens"]) for step, record in records.items()}
    assert "e" not in {name for step in range(added["step"]) for name in given[step]}
    assert all("d" not in given[step] for step in range(quarantined["step"], back["step"]))
    assert all(given[step] == {"e"} for step in range(ramp["step"] + 4, back["step"]))
    assert all(given[step] == {"a", "d"} for step in range(back["step"] + 1, chosen["step"]))
    assert set().union(*(given[step] for step in range(chosen["step"] + 1, chosen["step"] + 6))) == set("abcde")
    assert records[slower["step"] - 1]["lr"] == 2 * records[slower["step"]]["lr"]
    again = {batch.step: batch_sha256(batch.digests) for batch in replay(run.run_dir, 0, max(records))}
    assert again == {step: record["batch_sha256"] for step, record in records.items()}


def test_what_cannot_be_is_refused_and_changes_nothing(live: Any, tmp_path: Path) -> None:
    run = live()
    assert "unknown source 'zz'" in run.refused("set-mix", weights={"zz": 1.0})
    assert "sum to 0" in run.refused("set-mix", weights={"a": 0.0})
    assert "is over" in run.refused("set-mix", weights={"a": 1.0}, at="0")
    assert "no policy 'oracle'" in run.refused("set-policy", kind="oracle")
    assert "options" in run.refused("set-policy", kind="static", options={"no": "such"})
    assert "no source 'zz'" in run.refused(
        "set-policy", kind="schedule", options={"stages": [{"from_step": 0, "weights": {"zz": 1}}]}
    )
    assert "is over" in run.refused("stop-at", at="0")
    assert f"ends after {LONG} steps" in run.refused("stop-at", at=f"+{LONG}")
    assert "no source 'zz'" in run.refused("quarantine", source="zz")
    assert "not paused" in run.refused("resume")
    assert "the run has a source 'a'" in run.refused("add-source", source={"name": "a", "paths": ["x"]})
    assert "no file at" in run.refused("add-source", source={"name": "e", "paths": [str(tmp_path / "nowhere.jsonl")]})
    assert "journal has" in run.refused("undo", event=10_000_000)
    assert "not asked for by a command" in run.refused("undo", event=0)
    saved = run.accepted("save-now")
    assert "no lasting effect" in run.refused("undo", event=saved["event"])
    for name in "abc":
        run.accepted("quarantine", source=name)
    assert "no source with a weight would be left" in run.refused("quarantine", source="d")
    assert "no source with a weight would be left" in run.refused("set-mix", weights={"a": 1.0})
    mixed = run.accepted("set-mix", weights={"d": 1.0})
    undone = run.accepted("undo", event=mixed["event"])
    assert "undone before" in run.refused("undo", event=mixed["event"])
    assert "first command again" in run.refused("undo", event=undone["event"])


def test_a_command_begins_with_the_first_step_that_is_not_prepared(live: Any) -> None:
    run = live(data__prefetch=5)
    for _ in range(5):
        before = run.ask("status")["step"]
        begins = run.accepted("set-mix", weights={"a": 1.0})["step"]
        after = run.ask("status")["step"]
        assert before + 6 <= begins <= after + 6
