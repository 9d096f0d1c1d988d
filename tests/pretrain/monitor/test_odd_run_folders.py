"""A folder by another hand, or a broken one, takes no other run from the page, and shows nothing from elsewhere."""

import asyncio
import http.client
import json
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import orjson
import pytest
from dashboard_process import PATIENCE_S, dashboard, get, stored_run

from pretrain.monitor import views
from pretrain.monitor.app import Dashboard
from pretrain.monitor.live import News
from pretrain.monitor.run_files import check_data_of, open_plain, read_plain
from pretrain.monitor.run_folder import RunFolder
from pretrain.monitor.runs import Runs
from pretrain.monitor.source_epochs import epochs


def event_line(**fields: Any) -> bytes:
    """A journal line whose checksum is right, whatever stands in it."""
    body = orjson.dumps({"seq": 0, "time": 1.0, "step": 0, "kind": "run_started", "data": {}, "by": "config"} | fields)
    return body[:-1] + b',"crc":%d}\n' % zlib.crc32(body)


def odd_folder(root: Path, name: str) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
    return folder


@pytest.fixture(scope="module")
def odd_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("odd")
    root = base / "runs"
    stored_run(root / "good", steps=5)
    os.mkdir(os.fsencode(root) + b"/run-\xe9")
    for name in ("config.yaml", "metrics.jsonl"):
        with open(os.fsencode(root) + b"/run-\xe9/" + name.encode(), "w") as file:
            file.write('{"step": 0, "loss": 1.0}\n' if name == "metrics.jsonl" else "{}\n")
    (odd_folder(root, "time") / "journal.jsonl").write_bytes(event_line(time="soon"))
    (odd_folder(root, "who") / "journal.jsonl").write_bytes(event_line(by=7))
    (odd_folder(root, "steps") / "config.yaml").write_text(f"train: {{steps: {10**24}}}\n")
    (odd_folder(root, "text") / "config.yaml").write_text('run: {name: "\\ud800"}\n')
    nest = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 7))  # of 10^5 texts
    (odd_folder(root, "nest") / "config.yaml").write_text(
        f"a0: &a0 [x]\n{nest}run: {{name: *a6}}\nmetrics: {{dynamics: {{every: *a6}}}}\n"
    )
    (root / "folder" / "metrics.jsonl").mkdir(parents=True)
    (root / "folder" / "config.yaml").mkdir()
    (root / "folder" / "journal.jsonl").write_bytes(event_line())
    for name in ("metrics.jsonl", "journal.jsonl"):
        folder = root / f"pipe-{name}"
        folder.mkdir()
        other = "journal.jsonl" if name == "metrics.jsonl" else "metrics.jsonl"
        (folder / other).write_bytes(event_line() if other == "journal.jsonl" else b'{"step": 0, "loss": 1.0}\n')
        os.mkfifo(folder / name)
    outside = base / "outside"
    stored_run(outside)
    (outside / "attempts.jsonl").write_text('{"attempt": "secret"}\n')
    (outside / "rejects.jsonl").write_text('{"source": "secret", "file": "f", "record": 1, "reason": "r"}\n')
    (root / "linked").mkdir()
    for name in ("metrics.jsonl", "config.yaml", "rejects.jsonl"):
        (root / "linked" / name).symlink_to(outside / name)
    (root / "linked" / "launch").symlink_to(outside)
    (root / "linked" / "journal.jsonl").write_bytes(event_line())
    return root


@pytest.fixture(scope="module")
def site(odd_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with dashboard(odd_root, "", tmp_path_factory.mktemp("work")) as url:
        yield url


def test_odd_folders_take_no_run_from_the_list(site: str) -> None:
    rows = {row["run"]: row for row in get(site, "/api/runs")["runs"]}
    assert set(rows) == {
        "good", "run-\\udce9", "time", "who", "steps", "text", "nest", "folder", "pipe-metrics.jsonl",
        "pipe-journal.jsonl", "linked",
    }  # fmt: skip
    assert (rows["good"]["step"], rows["good"]["status"], rows["good"]["damage"]) == (5, "finished", "")
    assert rows["time"]["damage"].startswith("journal.jsonl: line 1 is damaged")
    assert rows["who"]["damage"].startswith("journal.jsonl: line 1 is damaged")
    assert rows["folder"]["damage"].startswith("metrics.jsonl cannot be read")
    assert rows["pipe-metrics.jsonl"]["damage"] == "metrics.jsonl cannot be read: not a regular file"
    assert rows["pipe-journal.jsonl"]["damage"] == "journal.jsonl cannot be read: not a regular file"
    assert (rows["steps"]["steps"], rows["nest"]["title"]) == (None, "nest")


def test_each_of_them_can_be_opened(site: str) -> None:
    for row in get(site, "/api/runs")["runs"]:
        detail = get(site, f"/api/run?run={quote(row['run'])}")
        assert detail["dynamics_every"] == 0
        for path in ("series", "events", "mixture", "heatmap", "sources", "system"):
            get(site, f"/api/{path}?run={quote(row['run'])}&name=loss")


def test_nothing_is_read_through_a_link(site: str) -> None:
    detail = get(site, "/api/run?run=linked")
    assert (detail["step"], detail["series"], detail["steps"]) == (0, [], None)
    assert "metrics.jsonl cannot be read" in detail["damage"]
    assert get(site, "/api/series?run=linked&name=loss")["series"] == {}
    assert get(site, "/api/sources?run=linked")["rejects"]["counts"] == []
    assert get(site, "/api/system?run=linked")["attempts"] == []


def test_news_of_all_runs_go_on(site: str, odd_root: Path) -> None:
    connection = http.client.HTTPConnection(urlsplit(site).netloc, timeout=PATIENCE_S)
    connection.request("GET", "/api/news")
    stream = connection.getresponse()

    def news() -> dict[str, Any]:
        while not (line := stream.readline()).startswith(b"data: "):
            assert line
        return json.loads(line[6:])["runs"]["good"]

    before = news()
    assert before["status"] == "finished"
    with (odd_root / "good" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "tokens": 6000, "loss": 1.5}\n')
    assert news()["version"] != before["version"]
    connection.close()


def test_a_run_that_cannot_be_shown_has_a_row_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bad", "good"):
        stored_run(tmp_path / name, steps=5)
    summary = RunFolder.summary

    def failing(self: RunFolder) -> dict[str, Any]:
        if self.name == "bad":
            raise RuntimeError("not foreseen")
        return summary(self)

    monkeypatch.setattr(RunFolder, "summary", failing)
    board = Dashboard(Runs(tmp_path))
    rows = {row["run"]: row for row in json.loads(board.all_runs())["runs"]}
    assert rows["good"]["step"] == 5
    assert (rows["bad"]["status"], rows["bad"]["damage"]) == (
        "damaged",
        "this run's files cannot be shown (RuntimeError)",
    )
    assert set(rows["bad"]) == set(rows["good"])
    assert board.news._look("")["runs"]["good"]["status"] == "finished"
    assert board.news._look("bad")["status"] == "damaged"


def test_news_of_one_topic_that_fails_do_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.monitor.live.LOOK_S", 0.01)
    looks = {"good": 0}

    def look(topic: str) -> Any:
        if topic == "bad":
            raise TypeError("not foreseen")
        looks["good"] += 1
        return {"look": looks["good"]}

    async def two_messages() -> list[bytes]:
        news = News(look)
        bad, good = news.stream("bad"), news.stream("good")
        await anext(bad)
        await anext(good)
        return [await asyncio.wait_for(anext(good), PATIENCE_S) for _ in range(2)]

    with ThreadPoolExecutor(1) as thread:  # this one may have playwright's event loop
        messages = thread.submit(asyncio.run, two_messages()).result()
    assert [json.loads(message[6:])["look"] for message in messages] == [1, 2]


def test_a_folder_that_may_not_be_looked_into_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored_run(tmp_path / "mine", steps=5)
    (tmp_path / "theirs").mkdir()

    def refusing(ask: Any) -> Any:
        def asked(self: Path, *given: Any, **more: Any) -> Any:
            if self.parent.name == "theirs":
                raise PermissionError(13, "Permission denied", str(self))
            return ask(self, *given, **more)

        return asked

    monkeypatch.setattr(Path, "stat", refusing(Path.stat))
    monkeypatch.setattr(Path, "lstat", refusing(Path.lstat))
    assert set(Runs(tmp_path).all()) == {"mine"}


def test_folders_whose_names_read_the_same_are_two_runs(tmp_path: Path) -> None:
    for name in (b"run-\xe9", rb"run-\udce9"):
        os.mkdir(os.fsencode(tmp_path) + b"/" + name)
        with open(os.fsencode(tmp_path) + b"/" + name + b"/metrics.jsonl", "w"):
            pass
    runs = Runs(tmp_path).all()
    assert len({run.path for run in runs.values()}) == len(runs) == 2


def test_the_data_that_another_users_run_names_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = stored_run(tmp_path / "run", steps=5)
    check_data_of(run)
    board = Dashboard(Runs(tmp_path))
    for changed in (run, run / "journal.jsonl"):
        if os.geteuid() == 0:
            os.chown(changed, 12345, -1)
        else:
            monkeypatch.setattr(os, "geteuid", lambda: 12345)
        folder = board.runs.get("run")
        assert folder is not None
        assert "belongs to another user" in epochs(folder)["error"]
        with pytest.raises(Exception, match="belongs to another user"):
            views_of_a_batch(board)
        if os.geteuid() == 0:
            os.chown(changed, 0, -1)


def views_of_a_batch(board: Dashboard) -> bytes:
    from starlette.requests import Request

    from pretrain.monitor.app import _batch

    return _batch(board, Request({"type": "http", "path": "/", "query_string": b"run=run&step=1", "headers": []}))


def test_the_end_of_a_file_begins_with_a_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one\ntwo\nthree\n")
    assert [read_plain(path, most, end=True) for most in (100, 14, 13, 10, 9, 6)] == [
        b"one\ntwo\nthree\n",
        b"one\ntwo\nthree\n",
        b"two\nthree\n",
        b"two\nthree\n",
        b"three\n",
        b"three\n",
    ]
    assert read_plain(path, 5) == b"one\nt"
    with pytest.raises(OSError, match="not a regular file"):
        open_plain(tmp_path)


def test_odd_events_are_shown_as_far_as_they_go(tmp_path: Path) -> None:
    run = stored_run(tmp_path / "run", steps=5)
    lines = [
        event_line(seq=number, kind="undone", data={"event": found, "command_undone": "c"})
        for number, found in enumerate([1, "x", [2], {"a": 1}, None])
    ]
    (run / "journal.jsonl").write_bytes(b"".join(lines))
    folder = RunFolder("run", run)
    folder.update()
    assert folder.journal.damage == ""
    assert views.events(folder, -1, [])["undone"] == [1]


def test_merge_keys_in_a_configuration_are_not_multiplied_out(tmp_path: Path) -> None:
    folder = odd_folder(tmp_path, "run")
    text = "train: {steps: 7}\nx0: &x0 {a: 1}\n"
    for level in range(1, 4):
        text += f"x{level}: &x{level} {{<<: [{', '.join([f'*x{level - 1}'] * 9)}]}}\n"
    (folder / "config.yaml").write_text(text)
    assert RunFolder("run", folder).config() == {}
    (folder / "config.yaml").write_text('train: {steps: 7}\nnote: "<<"\nlist: &a [1]\nagain: *a\n')
    assert RunFolder("run", folder).setting("train", "steps") == 7
