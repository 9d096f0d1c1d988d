"""What the pages say holds now: states that follow from the clock, files beside the metrics, a run that began anew."""

import json
import re
import time
from pathlib import Path

import orjson
import pytest
from dashboard_process import dashboard, get, stored_run

import pretrain.monitor
from data_scheduler.control import UNDOABLE
from data_scheduler.journal import Journal
from pretrain.monitor import system
from pretrain.monitor.app import Dashboard
from pretrain.monitor.journal_tail import JournalTail
from pretrain.monitor.run_folder import RunFolder
from pretrain.monitor.runs import Runs


def live_run(folder: Path) -> Path:
    """A run that has trained 5 of 100 steps."""
    run = stored_run(folder, steps=5)
    (run / "config.yaml").write_text("train: {steps: 100}\n")
    lines = (run / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (run / "journal.jsonl").write_bytes(b"".join(lines[:-1]))
    return run


def test_the_news_say_when_a_killed_run_falls_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live_run(tmp_path / "run")
    board = Dashboard(Runs(tmp_path))
    before = board._look("")["runs"]["run"]
    now = time.time()
    monkeypatch.setattr("pretrain.monitor.run_folder.time.time", lambda: now + 3600)
    after = board._look("")["runs"]["run"]
    assert (before["status"], after["status"]) == ("training", "silent")
    assert before["version"] == after["version"]


def test_what_changes_beside_the_metrics_is_seen(tmp_path: Path) -> None:
    run = live_run(tmp_path / "run")
    journal = Journal(run / "journal.jsonl")
    journal.append("checkpoint", 5, {"tokens": 5000}, "system")
    journal.close()
    kept = run / "checkpoints" / "step-00000005"
    kept.mkdir(parents=True)
    with dashboard(tmp_path, "", tmp_path) as site:
        seen = get(site, "/api/system?run=run")
        assert (seen["checkpoints"][0]["there"], seen["attempts"]) == (True, [])
        assert get(site, "/api/run?run=run")["steps"] == 100
        assert get(site, "/api/sources?run=run")["rejects"]["counts"] == []

        kept.rmdir()
        (run / "launch").mkdir()
        (run / "launch" / "attempts.jsonl").write_text('{"attempt": 1}\n')
        (run / "config.yaml").write_text("train: {steps: 2000}\n")
        (run / "rejects.jsonl").write_text('{"source": "a", "file": "f", "record": 1, "reason": "torn: x"}\n')
        seen = get(site, "/api/system?run=run")
        assert (seen["checkpoints"][0]["there"], seen["attempts"]) == (False, [{"attempt": "1"}])
        assert get(site, "/api/run?run=run")["steps"] == 2000
        assert get(site, "/api/sources?run=run")["rejects"]["counts"] == [{"source": "a", "reason": "torn", "count": 1}]


def test_of_many_attempts_the_newest_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "MOST_BYTES", 1000)
    run = RunFolder("run", stored_run(tmp_path / "run", steps=5))
    (run.path / "launch").mkdir()
    lines = [json.dumps({"attempt": number}) for number in range(500)]
    (run.path / "launch" / "attempts.jsonl").write_text("\n".join(lines) + "\n")
    shown = [int(row["attempt"]) for row in system.starts_and_checkpoints(run)["attempts"]]
    assert shown == list(range(500 - len(shown), 500))
    assert len(shown) > 50


def test_a_journal_that_is_begun_anew_under_the_same_inode_is_read_anew(tmp_path: Path) -> None:
    def written(why: str, count: int) -> bytes:
        journal = Journal(tmp_path / "new.jsonl")
        for step in range(count):
            journal.append("resumed", step, {"why": why}, "system")
        journal.close()
        content = (tmp_path / "new.jsonl").read_bytes()
        (tmp_path / "new.jsonl").unlink()
        return content

    path = tmp_path / "journal.jsonl"
    path.write_bytes(written("first", 3))
    tail = JournalTail(path)
    tail.update()
    inode, version = path.stat().st_ino, tail.version
    for count in (3, 5):
        path.write_bytes(written("other", count))
        assert path.stat().st_ino == inode
        tail.update()
        assert [event.data["why"] for event in tail.events] == ["other"] * count
        assert tail.damage == ""
        assert tail.version != version


def test_only_what_can_be_undone_has_a_button_for_it() -> None:
    source = Path(pretrain.monitor.__file__).parent / "frontend" / "src" / "pages" / "control.tsx"
    found = re.search(r"const UNDOABLE = (\[.*\]);", source.read_text())
    assert found is not None
    assert set(orjson.loads(found[1])) == set(UNDOABLE)
