"""Several ranks and clients, kills at random moments, other world sizes: the journal alone decides what happens."""

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import child_process
import pytest
from process_group import run_ranks
from small_corpus import jsonl, make_documents
from small_run import curve, go, maker, run_to_end

from data_scheduler import DataConfig, Journal, batch_sha256
from data_scheduler.replay import replay
from headrace.errors import HeadraceError
from pretrain.config import RunConfig
from pretrain.control.client import ByFile, ByHttp, ask

STEPS = 36


class Client(threading.Thread):
    """Asks for things at random, by file or over HTTP, and keeps the answers."""

    def __init__(self, config: RunConfig, rng: random.Random, new: Path, until: threading.Event) -> None:
        super().__init__(daemon=True)
        self.run_dir, self.rng, self.new, self.until = Path(config.run.dir), rng, new, until
        self.files = sorted(str(path) for path in Path(config.data.sources[1].paths[0]).iterdir())
        self.answers: list[dict[str, Any]] = []

    def run(self) -> None:
        self.ask({"command": "status"})
        while not self.until.wait(self.rng.random() * 0.15):
            command = self.any_command()
            answer = self.ask(command)
            if command["command"] == "pause":
                self.ask({"command": "resume"})
            elif command["command"] == "quarantine" and answer.get("status") == "accepted":
                self.until.wait(self.rng.random() * 0.3)
                self.ask({"command": "undo", "event": answer["event"]})

    def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        try:
            way = ByHttp.of_run(self.run_dir) if self.rng.random() < 0.5 else ByFile(self.run_dir)
            answer = ask(way, command, f"client {self.name}", 3.0)
        except HeadraceError:  # killed meanwhile, or not up yet
            return {}
        self.answers.append(answer)
        return answer

    def any_command(self) -> dict[str, Any]:
        rng = self.rng
        stages = [{"from_step": step, "weights": {"abcd"[step % 4]: 2.0, "a": 1.0}} for step in range(0, STEPS, 5)]
        events = [answer["event"] for answer in self.answers if answer["status"] == "accepted"]
        at = rng.choice([None, None, f"+{rng.randrange(9)}", str(rng.randrange(STEPS))])
        over = rng.choice([None, None, rng.randrange(2, 9)])
        weights = {name: rng.random() for name in rng.sample("abcde", 3)}
        return rng.choice(
            [
                {"command": "set-mix", "weights": weights, "at": at, "over": over},
                {"command": "set-mix", "weights": weights, "at": at, "over": over},
                {"command": "set-policy", "kind": "schedule", "options": {"stages": stages}, "at": at},
                {"command": "set-policy", "kind": "static", "at": at},
                {"command": "set-lr-scale", "scale": rng.choice([0.5, 0.7, 1.3]), "at": at},
                {"command": "quarantine", "source": rng.choice("abcde")},
                {"command": "quarantine", "source": "b", "file": rng.choice(self.files)},
                {"command": "quarantine", "source": "b", "file": rng.choice(self.files)},
                {"command": "add-source", "source": {"name": "e", "paths": [str(self.new)], "weight": 0.7}},
                {"command": "undo", "event": rng.choice(events or [0])},
                {"command": "save-now"},
                {"command": "pause"},
            ]
        )


def lines(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def kill(pid: int) -> None:
    """End a run at once: the ranks die with the process that forked them; what each has forked is in its session."""
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)


def session(config: RunConfig, ranks: int, rng: random.Random, new: Path, kill_after: int | None) -> list[Any]:
    """A start of the run under fire from three clients, killed after so many records; the answers they got."""
    run_dir = Path(config.run.dir)
    log = run_dir.with_suffix(".log")
    target = 10**9 if kill_after is None else lines(run_dir) + kill_after
    quiet = lines(run_dir) + 8
    over = threading.Event()

    def start() -> int:
        return max(run_ranks(ranks, go, config, timeout_s=200)) if ranks > 1 else go(config)

    pid = child_process.start(start, log)
    clients = [Client(config, random.Random(rng.random()), new, over) for _ in range(3)]
    for client in clients:
        client.start()
    deadline = time.monotonic() + 220
    try:
        while os.waitpid(pid, os.WNOHANG) == (0, 0):
            assert time.monotonic() < deadline, log.read_text()
            if lines(run_dir) >= target:
                time.sleep(rng.random() * 0.1)
                kill(pid)
                break
            if kill_after is None and lines(run_dir) > quiet:
                over.set()
                if not any(client.is_alive() for client in clients):
                    Client(config, random.Random(0), new, over).ask({"command": "resume"})
            time.sleep(0.02)
    finally:
        over.set()
        for client in clients:
            client.join()
    return [answer for client in clients for answer in client.answers]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_run_under_fire_equals_one_that_knew_its_journal_from_the_start(
    data_config: Callable[..., DataConfig], tmp_path: Path
) -> None:
    new = tmp_path / "new.jsonl"
    new.write_bytes(jsonl(make_documents("new", 300, 0)))
    # At a learning rate of 1e-2 the rounding of another world size grows to 2e-3 of the loss in 48 steps.
    changes = {"train__steps": STEPS, "checkpoint__every": 7, "control__http": True, "optimizer__lr": 1e-3}
    config = maker(data_config, tmp_path)("live", **changes)
    rng = random.Random(os.environ.get("HEADRACE_SEED", "1"))
    answers = []
    for ranks, kill_after in ((4, 12), (2, 10), (4, None)):
        answers += session(config, ranks, rng, new, kill_after)
    log = (tmp_path / "live.log").read_text()
    run_dir = Path(config.run.dir)
    journal = Journal(run_dir / "journal.jsonl", writable=False)
    assert journal.events[-1].kind == "run_finished", log
    asked = [event for event in journal.events if event.by.startswith("user:")]
    # Each answer tells the truth about the journal, and nothing was carried out twice.
    accepted = {answer["id"]: answer for answer in answers if answer["status"] == "accepted"}
    events = {event.data["command"]: event for event in asked}
    assert len(events) == len(asked)
    for command, answer in accepted.items():
        assert (events[command].seq, events[command].step) == (answer["event"], answer["step"])
    refused = {answer["id"] for answer in answers if answer["status"] == "refused" and "id" in answer}
    assert not refused & set(events)
    assert len(events) > 5  # 30 to 60, as fast as the machine is
    records = [record for record in curve(config) if "loss" in record]
    assert [record["step"] for record in records] == list(range(STEPS))

    given = maker(data_config, tmp_path)("given", **changes)
    other = Journal(Path(given.run.dir) / "journal.jsonl")
    for event in journal.events:
        if event.kind in ("run_started", "manifest") or (event in asked and event.kind != "paused"):
            other.append(event.kind, event.step, event.data, event.by)
    other.close()
    run_to_end(given)
    for record, expected in zip((r for r in curve(given) if "loss" in r), records, strict=True):
        assert record["batch_sha256"] == expected["batch_sha256"], record["step"]
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert record["lr"] == expected["lr"]
    again = [batch_sha256(batch.digests) for batch in replay(run_dir, 0, STEPS - 1)]
    assert again == [record["batch_sha256"] for record in records]
