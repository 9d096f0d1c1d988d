"""What the dashboard answers, and what it refuses, over real HTTP."""

import http.client
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from dashboard_process import TOKEN, dashboard, stored_run

from data_scheduler.journal import Journal
from headrace.errors import ConfigError
from pretrain.monitor.access import check_address


class Site:
    def __init__(self, url: str) -> None:
        self.host = urlsplit(url).netloc

    def ask(self, path: str, body: Any = None, method: str = "GET", **headers: str) -> tuple[int, Any, dict[str, str]]:
        """(status, JSON or bytes, headers in lower case); underscores in header names are dashes."""
        connection = http.client.HTTPConnection(self.host, timeout=120)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        if content is not None:
            method = "POST"
            given = {"Content-Type": "application/json"} | given
        connection.request(method, path, content, given)
        reply = connection.getresponse()
        read = reply.read()
        found = {name.lower(): value for name, value in reply.getheaders()}
        connection.close()
        return reply.status, json.loads(read) if "json" in found.get("content-type", "") else read, found

    def get(self, path: str) -> Any:
        status, answer, _ = self.ask(path)
        assert status == 200, answer
        return answer


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    stored_run(root / "plain")
    stored_run(root / "sweep" / "lr=3", steps=10)
    outside = tmp_path_factory.mktemp("outside")
    stored_run(outside / "secret")
    (root / "link").symlink_to(outside)
    (outside / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
    return root


@pytest.fixture(scope="module")
def open_site(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with dashboard(root, "", tmp_path_factory.mktemp("open")) as url:
        yield Site(url)


@pytest.fixture(scope="module")
def guarded(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with dashboard(root, TOKEN, tmp_path_factory.mktemp("guarded")) as url:
        yield Site(url)


def test_runs_and_their_numbers(open_site: Site) -> None:
    runs = {row["run"]: row for row in open_site.get("/api/runs")["runs"]}
    assert set(runs) == {"plain", "sweep/lr=3"}
    plain = runs["plain"]
    assert (plain["status"], plain["step"], plain["steps"], plain["tokens"]) == ("finished", 40, 40, 40_000)
    assert plain["tokens_per_s"] == 5000.0
    detail = open_site.get("/api/run?run=plain")
    assert detail["sources"] == ["code", "prose"]
    assert detail["mixture"] == pytest.approx({"code": 0.5, "prose": 0.5})


def test_series_zoom_axis_and_smoothing(open_site: Site) -> None:
    whole = open_site.get("/api/series?run=plain&name=loss&name=val_loss/code&name=nothing&axis=tokens")["series"]
    assert set(whole) == {"loss", "val_loss/code"}
    assert whole["loss"]["x"] == [1000.0 * (step + 1) for step in range(40)]
    assert whole["val_loss/code"]["x"] == [0.0, 40_000.0]
    part = open_site.get("/api/series?run=plain&name=loss&from=10&to=12")["series"]["loss"]
    assert part["x"] == [9.0, 10.0, 11.0, 12.0, 13.0]
    assert len(open_site.get("/api/series?run=plain&name=loss&width=4")["series"]["loss"]["x"]) <= 10


def test_mixture_events_and_system(open_site: Site) -> None:
    mixture = open_site.get("/api/mixture?run=plain&width=10")
    assert mixture["tokens"] == {"code": 20_000.0, "prose": 20_000.0}
    assert mixture["asked"]["code"] == pytest.approx([0.5] * 10)
    assert mixture["realised"]["prose"] == pytest.approx([0.5] * 10)
    assert [event["kind"] for event in open_site.get("/api/events?run=plain")["events"]] == [
        "run_started",
        "run_finished",
    ]
    assert [row["kind"] for row in open_site.get("/api/system?run=plain")["starts"]] == ["run_started", "run_finished"]
    assert "first checkpoint" in open_site.get("/api/sources?run=plain")["epochs"]["error"]


@pytest.mark.parametrize(
    "name",
    ["../outside0/secret", "/etc", "link/secret", "link", "plain/../plain", "", ".", "plain\x00", "sweep"],
)
def test_only_runs_that_were_found_can_be_named(open_site: Site, name: str) -> None:
    for path in ("run", "series", "events", "mixture", "batch", "heatmap", "sources", "system", "news"):
        if path == "news" and not name:
            continue  # of all runs
        status, answer, _ = open_site.ask(f"/api/{path}?run={quote(name)}")
        assert (status, list(answer)) == (404, ["error"])


@pytest.mark.parametrize(
    "path", ["/../pyproject.toml", "/static/../app.py", "/%2e%2e/app.py", "/app.js/", "/api/x", "//"]
)
def test_no_other_file_is_served(open_site: Site, path: str) -> None:
    status, answer, _ = open_site.ask(path)
    assert status in (404, 307)
    assert b"import" not in (answer if isinstance(answer, bytes) else b"")


def test_odd_questions_get_one_line(open_site: Site) -> None:
    for query, status in (
        ("series?run=plain&width=x", 400),
        ("series?run=plain&from=x", 400),
        ("series?run=plain&width=" + "9" * 400, 400),
        ("batch?run=plain&step=40", 400),
        ("batch?run=plain&step=1", 409),  # its data is not there
        ("series?run=plain&name=" + "x" * 9000, 414),
    ):
        found, answer, _ = open_site.ask(f"/api/{query}")
        assert found == status, (query, answer)
        assert "\n" not in answer["error"]
    assert open_site.ask("/api/series?run=plain&name=loss&from=nan&to=inf&window=999999999999")[0] == 200


def test_without_a_token_nothing_can_be_changed(open_site: Site, root: Path) -> None:
    before = sorted(str(path) for path in (root / "plain").rglob("*"))
    status, answer, _ = open_site.ask("/api/command", {"run": "plain", "ask": {"command": "pause"}})
    assert status == 403
    assert "token" in answer["error"]
    assert open_site.get("/api/session") | {"version": ""} == {"known": True, "control": False, "version": ""}
    assert sorted(str(path) for path in (root / "plain").rglob("*")) == before


def test_another_name_for_this_machine_is_refused_without_a_token(open_site: Site) -> None:
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "10.0.0.1"):
        assert open_site.ask("/api/runs", Host=host)[0] == 421
    assert open_site.ask("/api/runs", Host="localhost:1234")[0] == 200


def test_a_wrong_token_opens_nothing(guarded: Site) -> None:
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": TOKEN},
        {"Cookie": "headrace_dashboard=x"},
    ):
        for path in ("/api/runs", "/api/run?run=plain", "/api/news"):
            assert guarded.ask(path, **headers)[0] == 401
        assert guarded.ask("/api/command", {"run": "plain", "ask": {"command": "pause"}}, **headers)[0] == 401
    for wrong in ("", "x", TOKEN[:-1], TOKEN + "x", "é" * 30, None, 5, [TOKEN]):
        assert guarded.ask("/api/login", {"token": wrong})[0] == 401
    assert guarded.get("/api/session")["known"] is False


def test_the_token_opens_by_header_and_by_cookie(guarded: Site) -> None:
    assert guarded.ask("/api/runs", Authorization=f"Bearer {TOKEN}")[0] == 200
    status, _, headers = guarded.ask("/api/login", {"token": TOKEN})
    assert status == 200
    cookie = headers["set-cookie"]
    assert TOKEN not in cookie
    assert "httponly" in cookie.lower()
    assert "samesite=strict" in cookie.lower()
    assert guarded.ask("/api/runs", Cookie=cookie.partition(";")[0])[0] == 200


def test_only_this_page_may_send_commands_and_only_small_ones(guarded: Site, root: Path) -> None:
    right = {"Authorization": f"Bearer {TOKEN}"}
    body = {"run": "plain", "ask": {"command": "status"}}
    assert guarded.ask("/api/command", body, **right, Origin="https://evil.example")[0] == 403
    assert guarded.ask("/api/command", body, **right, Content_Type="text/plain")[0] == 415
    assert guarded.ask("/api/command", b"x" * 70_000, **right)[0] == 413
    assert guarded.ask("/api/command", b"[1]", **right)[0] == 400
    assert guarded.ask("/api/command", b"{", **right)[0] == 400
    assert guarded.ask("/api/command", {"run": "../x", "ask": {}}, **right)[0] == 404
    assert guarded.ask("/api/runs", method="DELETE", **right)[0] == 405
    # What could not be a command is refused before it is put anywhere.
    for wrong in ({"command": "rm"}, {"command": "set-mix", "weights": {"code": -1}}, {}):
        status, answer, _ = guarded.ask("/api/command", {"run": "plain", "ask": wrong}, **right)
        assert (status, answer["status"]) == (200, "refused")
    assert not list((root / "plain").glob("control/inbox/*"))


def test_every_answer_carries_a_policy_that_lets_no_foreign_script_in(guarded: Site) -> None:
    for path in ("/", "/app.js", "/api/runs", "/api/session"):
        headers = guarded.ask(path)[2]
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"


def test_news_comes_when_a_run_goes_on(tmp_path: Path) -> None:
    run = stored_run(tmp_path / "runs" / "live", steps=5)
    with dashboard(tmp_path / "runs", "", tmp_path) as url:
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
        connection.request("GET", "/api/news?run=live")
        stream = connection.getresponse()
        assert stream.getheader("content-type", "").startswith("text/event-stream")

        def next_step() -> int:
            while True:
                line = stream.readline()
                if line.startswith(b"data: "):
                    return int(json.loads(line[6:])["step"])

        assert next_step() == 5
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 5, "tokens": 6000, "loss": 1.5}\n')
        assert next_step() == 6
        connection.close()


def test_a_damaged_journal_is_told(tmp_path: Path) -> None:
    run = stored_run(tmp_path / "runs" / "damaged", steps=5)
    lines = (run / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (run / "journal.jsonl").write_bytes(lines[0] + lines[1].replace(b"policy", b"POLICY") + lines[2])
    with dashboard(tmp_path / "runs", "", tmp_path) as url:
        row = Site(url).get("/api/runs")["runs"][0]
    assert "line 2 is damaged" in row["damage"]
    assert row["step"] == 5


def test_a_run_that_is_silent_is_not_called_training(tmp_path: Path) -> None:
    from pretrain.monitor.run_folder import RunFolder

    folder = stored_run(tmp_path / "run", steps=5)
    (folder / "config.yaml").write_text("train: {steps: 100}\n")
    journal = (folder / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "journal.jsonl").write_bytes(b"".join(journal[:-1]))
    run = RunFolder("run", folder)
    run.update()
    assert run.summary()["status"] == "training"
    assert run.summary()["left_s"] == pytest.approx(95 * 0.2)
    paused = Journal(folder / "journal.jsonl")
    paused.append("paused", 5, {"value": True}, "user:a@b")
    run.update()
    assert run.summary()["status"] == "paused"
    paused.append("paused", 5, {"value": False}, "user:a@b")
    run.update()
    run.metrics.modified = time.time() - 3600
    for event in run.journal.events:
        object.__setattr__(event, "time", time.time() - 3600)
    assert run.summary()["status"] == "silent"


@pytest.mark.parametrize(
    ("host", "token"),
    [("0.0.0.0", ""), ("example.org", ""), ("127.0.0.1", "short"), ("::", ""), ("127.0.0.1", "spaces in a long token")],
)
def test_addresses_that_need_a_token_and_weak_tokens_are_refused(host: str, token: str) -> None:
    with pytest.raises(ConfigError, match="token"):
        check_address(host, token)
