"""Messages to people, through real processes: a web server, a mail server and a program that take them."""

import json
import os
import signal
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import child_process
import pytest

from data_scheduler.journal import Journal
from headrace.errors import CheckpointError, ConfigError, ExitCode
from pretrain.alerts.courier import Courier
from pretrain.alerts.run import Alerts, alerting, usable_hooks
from pretrain.config.alerts import AlertsConfig

PATIENCE_S = 120.0


def eventually(ask: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if answer := ask():
            return answer
        time.sleep(0.02)
    raise AssertionError("waited in vain")


class Web(ThreadingHTTPServer):
    """Notes what is posted; refuses the first `refusals` requests."""

    def __init__(self) -> None:
        self.got: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.refusals = 0
        super().__init__(("127.0.0.1", 0), _WebHandler)
        self.url = f"http://127.0.0.1:{self.server_port}/hook"

    @property
    def events(self) -> list[str]:
        return [body["event"] for _, body in self.got]


class _WebHandler(BaseHTTPRequestHandler):
    server: Web

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        refuse, self.server.refusals = self.server.refusals > 0, self.server.refusals - 1
        if not refuse:
            self.server.got.append((dict(self.headers), body))
        self.send_response(503 if refuse else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


class _MailHandler(socketserver.StreamRequestHandler):
    """Enough of SMTP (RFC 5321) to take mails."""

    def handle(self) -> None:
        self.wfile.write(b"220 sink\r\n")
        while line := self.rfile.readline():
            verb = line[:4].upper()
            if verb == b"DATA":
                self.wfile.write(b"354 go on\r\n")
                mail = b""
                while (part := self.rfile.readline()) not in (b".\r\n", b""):
                    mail += part
                self.server.mails.append(mail.decode())  # type: ignore[attr-defined]
            self.wfile.write(b"221 bye\r\n" if verb == b"QUIT" else b"250 ok\r\n")
            if verb == b"QUIT":
                return


@pytest.fixture
def web() -> Iterator[Web]:
    with Web() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


def config(*hooks: dict[str, Any], **options: Any) -> AlertsConfig:
    return AlertsConfig.model_validate({"hooks": list(hooks), "retry_s": 0.02, "linger_s": PATIENCE_S} | options)


def webhook(web: Web, **more: Any) -> dict[str, Any]:
    return {"kind": "webhook", "url": web.url} | more


def states(run_dir: Path) -> list[str]:
    return [json.loads(line)["state"] for line in (run_dir / "log" / "alerts.jsonl").read_text().splitlines()]


def test_records_and_journal_reach_people(web: Web, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    alerts = Alerts(config(webhook(web)), tmp_path, "demo")
    sink = alerts.sink(journal)
    record = {"loss": 3.0, "grad_norm": 1.0, "not_finite": 0}
    sink.write({"step": 0, **record})
    sink.write({"step": 1, **record, "loss": float("nan"), "not_finite": 1})
    sink.write({"step": 2, **record, "loss": float("nan"), "not_finite": 1})  # the same still
    journal.append("anomaly", 3, {"anomaly": 3, "why": "loss 9 is far above 3", "action": "warned"}, "system")
    journal.append("anomaly", 4, {"anomaly": 3, "cause": "unknown", "action": "none"}, "system")
    journal.append("rollback", 2, {"anomaly": 4, "to": 2, "passed_over": [3, 4]}, "system")
    sink.write({"step": 3, **record})
    sink.close()
    alerts.ended(ExitCode.DONE)
    alerts.close()
    assert web.events == ["not_finite", "loss_spike", "rollback", "run_finished"]
    bodies = [body for _, body in web.got]
    assert [body["step"] for body in bodies] == [2, 4, 4, 4]
    assert all(body["run"] == "demo" for body in bodies)
    assert bodies[0]["text"] == "loss nan, gradient norm 1.0"
    assert "[3, 4]" in bodies[2]["text"]
    assert states(tmp_path).count("delivered") == 4


def test_how_a_run_fails_is_told(web: Web, tmp_path: Path) -> None:
    class OfRun:
        alerts = config(webhook(web))

        class run:
            dir, name = str(tmp_path), "demo"

    with pytest.raises(CheckpointError), alerting(OfRun, OfRun.alerts.hooks, True):  # type: ignore[arg-type]
        raise CheckpointError("checkpoint of step 8 not written: No space left on device")
    assert web.events == ["checkpoint_failed", "run_failed"]
    assert web.got[1][1]["text"] == "CheckpointError: checkpoint of step 8 not written: No space left on device"


def test_a_killed_trainer_is_told_by_its_courier(web: Web, tmp_path: Path) -> None:
    def trainer() -> None:
        alerts = Alerts(config(webhook(web)), tmp_path, "demo")
        alerts.beat(7)
        os.kill(os.getpid(), signal.SIGKILL)

    assert child_process.run(trainer) == -signal.SIGKILL
    eventually(lambda: web.events == ["run_failed"])
    assert web.got[0][1]["step"] == 7
    assert "killed" in web.got[0][1]["text"]


def test_silence_is_a_stall_and_is_told_once_until_the_run_moves(web: Web, tmp_path: Path) -> None:
    alerts = Alerts(config(webhook(web), stall_s=0.3, repeat_s=0), tmp_path, "demo")
    alerts.beat(1)
    eventually(lambda: web.events == ["stall"])
    alerts.beat(2)
    eventually(lambda: web.events == ["stall", "stall"])
    alerts.close()
    assert web.events == ["stall", "stall"]


def test_repetitions_are_held_back_and_counted_over_restarts_too(web: Web, tmp_path: Path) -> None:
    for _ in range(2):
        alerts = Alerts(config(webhook(web)), tmp_path, "demo")
        alerts.beat(1)
        alerts.tell("rollback", "back to 0")
        alerts.tell("rollback", "back to 0")
        alerts.ended(ExitCode.DONE)
        alerts.close()
    assert web.events == ["rollback", "run_finished", "run_finished"]  # the end is always told
    assert states(tmp_path).count("held back") == 3
    alerts = Alerts(config(webhook(web), repeat_s=0), tmp_path, "demo")
    alerts.tell("rollback", "back to 0")
    alerts.close()
    assert web.got[-1][1]["suppressed"] == 3


def test_a_hook_that_is_down_is_tried_again_and_holds_up_no_other(web: Web, tmp_path: Path) -> None:
    with Web() as other:
        threading.Thread(target=other.serve_forever, args=(0.05,), daemon=True).start()
        web.refusals = 3
        only = webhook(web, events=["run_failed"])
        alerts = Alerts(config(only, webhook(other)), tmp_path, "demo")
        alerts.tell("rollback", "one")
        alerts.tell("run_failed", "two")
        alerts.close()
        other.shutdown()
    assert web.events == ["run_failed"]  # once, and only what it asked for
    assert other.events == ["rollback", "run_failed"]
    assert states(tmp_path).count("failed") == 3


def test_pauses_between_attempts_double(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paused: list[float] = []
    (tmp_path / "log").mkdir()
    hooks = [{"kind": "command", "command": ["false"], "events": ["stall"]}]
    courier = Courier(
        {"run": "r", "hooks": [], "log": str(tmp_path / "log" / "alerts.jsonl"), "retry_s": 2.0, "timeout_s": 9.0}
    )

    def wait(pause: float) -> bool:
        paused.append(pause)
        return len(paused) == 10

    monkeypatch.setattr(courier._over, "wait", wait)
    import queue

    waiting: queue.Queue[Any] = queue.Queue()
    waiting.put({"event": "stall", "run": "r", "text": "", "step": 0, "suppressed": 0})
    courier._serve(0, hooks[0], waiting)
    assert paused == [2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 300.0, 300.0]


def test_training_never_waits_for_a_courier_that_does_nothing(web: Web, tmp_path: Path) -> None:
    alerts = Alerts(config(webhook(web)), tmp_path, "demo")
    courier = alerts._courier
    assert courier is not None
    try:
        os.kill(courier.pid, signal.SIGSTOP)
        for step in range(20_000):  # a pipe takes 64 KB, some 4,000 beats; a write that waits would wait for ever
            alerts.beat(step)
        alerts.tell("rollback", "lost, and so be it")
        os.kill(courier.pid, signal.SIGCONT)
        eventually(lambda: alerts.tell("run_failed", "heard again") or "run_failed" in web.events)
    finally:
        courier.kill()
    courier.wait()
    alerts.beat(1)  # nobody reads: no error, no SIGPIPE
    alerts.close()


@pytest.mark.parametrize("python", ["/bin/false", "/no/such/python"])
def test_a_courier_that_cannot_start_stops_no_training(web: Web, tmp_path: Path, monkeypatch, python: str) -> None:
    monkeypatch.setattr("sys.executable", python)
    alerts = Alerts(config(webhook(web)), tmp_path, "demo")
    for step in range(5):
        alerts.beat(step)
        time.sleep(0.01)
    alerts.failed(ValueError("x"))
    alerts.close()
    assert not web.got


def test_slack_mail_and_programs(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEAM_SLACK", f"{web.url}/T000/secret-of-slack")
    monkeypatch.setenv("HOOK_TOKEN", "secret-of-hook")
    socketserver.ThreadingTCPServer.allow_reuse_address = True
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _MailHandler) as mail:
        mail.mails = []  # type: ignore[attr-defined]
        threading.Thread(target=mail.serve_forever, args=(0.05,), daemon=True).start()
        noted = tmp_path / "noted.json"
        hooks = (
            {"kind": "slack", "url_env": "TEAM_SLACK"},
            webhook(web, token_env="HOOK_TOKEN"),
            {"kind": "email", "host": "127.0.0.1", "port": mail.server_address[1], "security": "none"}
            | {"sender": "mill@example.org", "to": ["a@example.org", "b@example.org"]},
            {"kind": "command", "command": ["tee", str(noted)]},
        )
        alerts = Alerts(config(*hooks), tmp_path / "run", "demo")
        alerts.tell("rollback", "loss <script> & more\nBcc: eve@example.org")
        alerts.close()
        mail.shutdown()
        (sent,) = mail.mails  # type: ignore[attr-defined]
    by_slack = [body for _, body in web.got if "event" not in body]
    assert [body["text"] for body in by_slack] == [
        "🚨 demo: rollback at step 0: loss &lt;script&gt; &amp; more\nBcc: eve@example.org"
    ]
    ((headers, _),) = [request for request in web.got if "event" in request[1]]
    assert headers["Authorization"] == "Bearer secret-of-hook"
    head, _, _ = sent.partition("\r\n\r\n")
    assert "Subject: [headrace] demo: rollback" in head
    assert "To: a@example.org, b@example.org" in head
    assert "Bcc" not in head  # what a message says makes no header
    assert json.loads(noted.read_text())["event"] == "rollback"
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or b"secret-of" not in path.read_bytes()


def test_an_address_that_fails_is_not_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_SLACK_URL", "http://127.0.0.1:1/secret-of-slack")
    alerts = Alerts(config({"kind": "slack"}, linger_s=0), tmp_path, "demo")
    alerts.tell("rollback", "x")
    eventually(lambda: "failed" in states(tmp_path) if (tmp_path / "log" / "alerts.jsonl").exists() else False)
    alerts.close()
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"secret-of" not in path.read_bytes()


def test_a_variable_that_is_not_set_is_named_at_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class OfRun:
        alerts = config({"kind": "slack", "url_env": "NOT_SET_ANYWHERE"})

        class run:
            dir = str(tmp_path)

    with pytest.raises(ConfigError, match=r"alerts\.hooks\.0: the environment variable NOT_SET_ANYWHERE"):
        usable_hooks(OfRun)  # type: ignore[arg-type]
    (tmp_path / "journal.jsonl").touch()
    assert usable_hooks(OfRun) == []  # type: ignore[arg-type]
    assert "NOT_SET_ANYWHERE" in caplog.text


@pytest.mark.parametrize(
    ("hook", "words"),
    [
        ({"kind": "webhook"}, "one of url and url_env"),
        ({"kind": "webhook", "url": "http://a", "url_env": "B"}, "one of url and url_env"),
        ({"kind": "webhook", "url": "ftp://a"}, "no http"),
        ({"kind": "webhook", "url": "https://me:pw@a/"}, "use url_env"),
        ({"kind": "webhook", "url": "https://a/?key=1"}, "use url_env"),
        ({"kind": "email", "host": "h", "sender": "a", "to": ["b"], "user": "u"}, "belong together"),
        (
            {"kind": "email", "host": "h", "sender": "a", "to": ["b"]}
            | {"user": "u", "password_env": "P", "security": "none"},
            "in the clear",
        ),
        ({"kind": "email", "host": "h", "sender": "a\nBcc: e", "to": ["b"]}, "one line"),
        ({"kind": "slack", "url_env": "https://hooks"}, "pattern"),
        ({"kind": "slack", "events": ["spike"]}, "loss_spike"),
    ],
)
def test_what_cannot_work_or_leaks_is_refused(hook: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config(hook)
