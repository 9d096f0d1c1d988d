"""A live run obeys, answers, and does the same again: one process; see test_control_ranks.py for several."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import child_process
import pytest
from small_corpus import jsonl, make_documents
from small_run import Make, curve, maker
from typer.testing import CliRunner

from data_scheduler import DataConfig, Journal, batch_sha256
from data_scheduler.replay import replay, trace
from headrace.errors import UnreachableError
from pretrain.cli import app
from pretrain.config import RunConfig
from pretrain.control.client import ByFile, Way, ask
from pretrain.train import train

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

    def up(self) -> "Live":
        self._until((self.run_dir / "metrics.jsonl").exists)
        self.way: Way = ByFile(self.run_dir)
        return self

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

    def until_paused(self) -> None:
        self._until(lambda: bool(self.ask("status")["paused"]))

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
        return made[-1].up()

    yield start
    for run in made:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            run.kill()


def test_all_commands_one_after_the_other(live: Any, tmp_path: Path, run_config: Make) -> None:
    run = live()
    run.until_step(4)
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
    assert records[slower["step"] - 1]["lr"] == pytest.approx(2 * records[slower["step"]]["lr"], rel=1e-3)
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
    banded = {"name": "e", "paths": ["x"], "bands": {"by": "q", "count": 2}}
    assert "bands cannot enter a live run" in run.refused("add-source", source=banded)
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


def test_a_file_and_a_record_are_left_out_and_let_in_again(live: Any, run_config: Make) -> None:
    run = live()
    run.until_step(3)
    first = trace(run.run_dir, 1)
    document = next(document for document in first if document.source == "c")
    other = next(document for document in first if document.source == "b" and document.within is not None)
    for wrong, reason in (
        ({"file": "nowhere"}, "has no file 'nowhere'"),
        ({"record": 3}, "a record needs its file"),
        ({"file": document.file, "within": [0, 8]}, "name the record"),
        ({"file": document.file, "record": 10**6}, "is no document of source 'c'"),
    ):
        assert reason in run.refused("quarantine", source="c", **wrong)
    out = run.accepted("quarantine", source="c", file=document.file)
    what = f"b:{other.file}:{other.record}" + "@{}-{}".format(*other.within)
    assert ctl(str(run.run_dir), "quarantine", what).exit_code == 0
    assert "under quarantine already" in run.refused("quarantine", source="c", file=document.file)
    run.until_step(out["step"] + 2)
    assert run.ask("status")["quarantined"] == [what, f"c:{document.file}"]
    back = run.accepted("undo", event=out["event"])
    run.until_step(back["step"] + 2)
    assert run.ask("status")["quarantined"] == [what]
    run.accepted("stop-at", at="+2")
    run.end()
    hashes = {r["step"]: r["batch_sha256"] for r in curve(run_config("run")) if "batch_sha256" in r}
    for batch in replay(run.run_dir, 0, max(hashes)):
        assert batch_sha256(batch.digests) == hashes[batch.step]
    begun = [d for step in range(out["step"], back["step"]) for d in trace(run.run_dir, step) if d.token_start == 0]
    assert not [d for d in begun if d.file == document.file]


def test_a_command_begins_with_the_first_step_that_is_not_prepared(live: Any) -> None:
    run = live(data__prefetch=5)
    for _ in range(5):
        before = run.ask("status")["step"]
        begins = run.accepted("set-mix", weights={"a": 1.0})["step"]
        after = run.ask("status")["step"]
        assert before + 6 <= begins <= after + 6


def ctl(*words: str) -> Any:
    return CliRunner().invoke(app, ["ctl", *words])


def test_the_command_line_says_what_came_of_it(live: Any, tmp_path: Path) -> None:
    run = live(control__http=True)
    folder = str(run.run_dir)
    done = ctl(folder, "set-mix", "a=0.5", "d=0.5", "--at", "+50", "--why", "try d")
    assert done.exit_code == 0, done.output
    mixed = run.journal()[int(done.output.split()[2])]
    assert f"accepted: event {mixed.seq} (mixture), from step {mixed.step} on" in done.output
    assert mixed.data["why"] == "try d"
    shown = ctl(folder, "status").output
    assert f"event {mixed.seq}, step {mixed.step}: mixture by user:" in shown
    assert ": try d" in shown
    options = "stages=[{from_step: 5, weights: {a: 1}}]"
    assert ctl("--http", folder, "set-policy", "schedule", options).exit_code == 0
    url = json.loads((run.run_dir / "control" / "endpoint.json").read_text())
    token = tmp_path / "token"
    token.write_text(url["token"])
    token.chmod(0o600)
    answer = ctl("--json", "--token-file", str(token), url["url"], "set-lr-scale", "0.5")
    assert json.loads(answer.output)["status"] == "accepted"
    source = tmp_path / "source.yaml"
    (tmp_path / "e.jsonl").write_bytes(jsonl(make_documents("e", 50, 0)))
    source.write_text(f"name: e\npaths: [{tmp_path}/e.jsonl]\nweight: 1e-1\n")
    assert ctl(folder, "add-source", str(source)).exit_code == 0
    for words in (["set-eval-every", "7"], ["save-now"], ["quarantine", "b"], ["pause"], ["resume"]):
        done = ctl(folder, *words)
        assert done.exit_code == 0, done.output
    assert ctl(folder, "undo", str(mixed.seq)).exit_code == 0
    for words, reason in (
        (["set-mix", "zz=1"], "unknown source 'zz'"),
        (["quarantine", "a:file.jsonl:3"], "source 'a' has no file 'file.jsonl'"),
        (["quarantine", "a:file.jsonl:3@0-9"], "source 'a' has no file 'file.jsonl'"),
        (["undo", "0"], "not asked for by a command"),
        (["stop-at", "1"], "is over"),
    ):
        refused = ctl(folder, *words)
        assert refused.exit_code == 2
        assert reason in refused.output
    stop = ctl(folder, "stop-at", "+3")
    assert stop.exit_code == 0
    run.end()
    gone = ctl(folder, "status", "--timeout", "0.2")
    assert isinstance(gone.exception, UnreachableError)
    assert not (run.run_dir / "control" / "endpoint.json").exists()


def test_a_command_that_a_killed_run_had_taken_is_carried_out_once_when_it_goes_on(live: Any, run_config: Make) -> None:
    run = live(checkpoint__every=5)
    run.until_step(8)
    run.kill()
    done = run.journal()
    taken = run.run_dir / "control" / "taken"
    requests = {
        "00000001-lost": {"command": "set-lr-scale", "scale": 0.25},  # taken, then killed
        "00000002-told": {"command": "set-lr-scale", "scale": 4.0},  # journaled, then killed before it was answered
    }
    for name, command in requests.items():
        (taken / f"{name}.json").write_text(json.dumps({"id": name, "ask": command}))
    data = {"value": 4.0, "command": "00000002-told", "why": "", "via": "file"}
    Journal(run.run_dir / "journal.jsonl").append("lr_scale", done[-1].step, data, "user:ada@here")
    again = live(checkpoint__every=5)
    again.until_step(again.steps() + 3)
    answers = again.run_dir / "control" / "answers"
    told = {path.stem: json.loads(path.read_text()) for path in answers.iterdir()}
    assert {name: answer["status"] for name, answer in told.items()} == dict.fromkeys(requests, "accepted")
    assert told["00000002-told"]["event"] == len(done)
    events = [event.data["command"] for event in again.journal() if event.kind == "lr_scale"]
    assert events == ["00000002-told", "00000001-lost"]
    assert list(taken.iterdir()) == []


def test_a_run_that_was_paused_is_paused_when_it_is_started_again(live: Any) -> None:
    run = live(checkpoint__every=1)
    run.until_step(1)
    run.accepted("pause")
    steps = run.steps()
    run.kill()
    again = live(checkpoint__every=1)
    again.until_paused()  # the checkpoint of its last step may have been incomplete, and the step is done again
    assert again.steps() == steps
    os.kill(again.pid, signal.SIGTERM)  # a pause does not keep a run from ending
    again.end(4)
    last = live(checkpoint__every=1)
    last.accepted("resume")
    last.until_step(steps + 2)


def test_stop_at_ends_the_run_for_now(live: Any, run_config: Make) -> None:
    run = live()
    run.accepted("stop-at", at="+4")
    run.end()
    stopped = run.steps()
    assert "stop-at: saved at step" in run.log.read_text()
    again = live()
    again.until_step(stopped + 2)


def test_a_way_in_that_cannot_be_opened_is_one_line(run_config: Make) -> None:
    config = run_config("run", control__http=True, control__token_file="/nowhere/token")
    log = Path(config.run.dir).with_suffix(".log")
    assert child_process.run(lambda: train(config), log) == 2
    assert "headrace: error: control.token_file: /nowhere/token: No such file or directory" in log.read_text()
