"""A run folder has one training at a time, and is free again the moment that training is gone."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import child_process
import pytest
from process_group import run_ranks
from small_run import maker

from data_scheduler import DataConfig, Journal
from headrace.errors import BusyError
from parallel import process_groups
from parallel.layout import Layout
from pretrain import run_lock
from pretrain.run_lock import holding
from pretrain.train import train


def hold(run_dir: Path, told: Path) -> int:
    process_groups.initialize(Layout(1), seed=1)
    with holding(run_dir, 0):
        writer = os.fork()  # as one that writes a checkpoint
        if not writer:
            time.sleep(60)
            os._exit(0)
        (told.parent / "new").write_text(str(writer))
        (told.parent / "new").rename(told)
        time.sleep(60)
    return 0


def until_told(told: Path) -> None:
    for _ in range(600):
        if told.exists():
            return
        time.sleep(0.1)
    raise AssertionError("the first process never held the folder")


def test_a_folder_in_use_is_refused_and_free_when_its_process_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "PATIENCE_S", 0.3)
    run_dir, told = tmp_path / "run", tmp_path / "told"
    pid = child_process.start(lambda: hold(run_dir, told), tmp_path / "log")
    until_told(told)
    process_groups.initialize(Layout(1), seed=1)
    try:
        refused = f"another process trains in this folder .process {pid} on .*; one at a"
        with pytest.raises(BusyError, match=refused), holding(run_dir, 0):
            raise AssertionError("both have it")
        os.kill(pid, signal.SIGKILL)
        child_process.wait(pid)
        with holding(run_dir, 0):  # though its child lives
            os.kill(int(told.read_text()), 0)
        with holding(run_dir, 0):
            pass
    finally:
        os.kill(int(told.read_text()), signal.SIGKILL)
        process_groups.shutdown()


def refused_together(run_dir: Path) -> str:
    ranks = process_groups.initialize(Layout(2), seed=1, timeout_s=60)
    try:
        with holding(run_dir, ranks.rank):
            return "held"
    except BusyError as error:
        return str(error)


@pytest.mark.multiprocess
def test_every_rank_hears_that_the_folder_is_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "PATIENCE_S", 0.3)
    assert run_ranks(2, refused_together, tmp_path / "free", timeout_s=120) == ["held", "held"]
    run_dir, told = tmp_path / "run", tmp_path / "told"
    pid = child_process.start(lambda: hold(run_dir, told), tmp_path / "log")
    until_told(told)
    told_both = run_ranks(2, refused_together, run_dir, timeout_s=120)
    for each in (pid, int(told.read_text())):
        os.kill(each, signal.SIGKILL)
    child_process.wait(pid)
    assert all("another process trains in this folder" in one for one in told_both)


def test_two_trainings_in_one_folder(
    data_config: Callable[..., DataConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second is refused, and the first's journal is what it would have been."""
    monkeypatch.setattr(run_lock, "PATIENCE_S", 0.3)
    config = maker(data_config, tmp_path)("run", train__steps=10**6)
    metrics = tmp_path / "run" / "metrics.jsonl"
    pid = child_process.start(lambda: train(config), tmp_path / "first.log")
    for _ in range(600):
        if metrics.exists() and metrics.read_text().count("grad_norm") > 3:
            break
        time.sleep(0.1)
    second = tmp_path / "second.log"

    def refused() -> int:
        with pytest.raises(BusyError, match="one at a time"):
            train(config)
        return 0

    assert child_process.run(refused, second) == 0, second.read_text()
    os.kill(pid, signal.SIGTERM)
    assert child_process.wait(pid) == 4, (tmp_path / "first.log").read_text()
    events = Journal(tmp_path / "run" / "journal.jsonl", writable=False).events
    assert [event.kind for event in events].count("run_started") == 1
