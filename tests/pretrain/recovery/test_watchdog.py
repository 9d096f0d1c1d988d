"""A process that hangs says where, and ends."""

import ctypes
import signal
import time
from collections.abc import Callable
from pathlib import Path

import child_process
import pytest
from small_run import maker
from tiny_run import tiny_batch, tiny_config, tiny_state

from data_scheduler import DataConfig
from headrace.errors import ExitCode
from parallel import process_groups
from parallel.layout import Layout
from pretrain import loop
from pretrain.recovery.watchdog import Watchdog
from pretrain.step import evaluate_step
from pretrain.train import train


def stuck_here(seconds: float) -> None:
    time.sleep(seconds)


def test_a_hang_is_reported_with_stacks_and_ends_with_its_code(tmp_path: Path) -> None:
    def hang() -> None:
        told = {"data loader": lambda: "next step 7", "broken": lambda: 1 // 0}
        with Watchdog(2.0, tmp_path, rank=3, more=told) as watchdog:  # type: ignore[arg-type]
            watchdog.beat("step 7")
            stuck_here(60)

    log = tmp_path / "log"
    assert child_process.run(hang, log) == ExitCode.WATCHDOG
    report = (tmp_path / "watchdog-rank-00003.txt").read_text()
    for text in ("since: step 7", "next step 7", "cannot be told: ZeroDivisionError", "last collectives", "stuck_here"):
        assert text in report
    assert "no progress for" in log.read_text()


def test_a_hang_that_holds_pythons_lock_is_ended_by_the_kernel_with_stacks(tmp_path: Path) -> None:
    def hang() -> None:
        with Watchdog(0.8, tmp_path, rank=0) as watchdog:
            watchdog.beat("step 1")
            ctypes.PyDLL(None).sleep(60)  # PyDLL keeps the lock

    assert child_process.run(hang) == -signal.SIGALRM
    assert "hang" in (tmp_path / ".stacks-rank-00000.txt").read_text()


def test_it_watches_from_the_first_beat_on_and_not_while_it_rests(tmp_path: Path) -> None:
    def work() -> None:
        with Watchdog(2.0, tmp_path, rank=0) as watchdog:
            time.sleep(2.5)
            watchdog.beat("step 1")
            watchdog.rest()
            time.sleep(2.5)
            watchdog.beat("step 2")
            stuck_here(60)

    log = tmp_path / "log"
    assert child_process.run(work, log) == ExitCode.WATCHDOG
    assert "since: step 2" in log.read_text()


def test_building_the_model_is_watched(data_config: Callable[..., DataConfig], tmp_path: Path) -> None:
    config = maker(data_config, tmp_path)("run", recovery__watchdog_s=4.0)

    def run() -> int:
        loop.build_state = lambda *_: stuck_here(60)  # type: ignore[assignment]
        return int(train(config))

    assert child_process.run(run, tmp_path / "log") == ExitCode.WATCHDOG
    assert "since: building the model" in (tmp_path / "log").read_text()


def test_every_micro_batch_of_an_evaluation_is_progress() -> None:
    state = tiny_state(tiny_config(), Layout(1))
    try:
        beats: list[str] = []
        state.beat = beats.append
        microbatches = tiny_batch(0)
        evaluate_step(state, microbatches)
        assert len(beats) == len(microbatches) > 1
    finally:
        process_groups.shutdown()


@pytest.mark.parametrize("timeout_s", [0.0, 0.6])
def test_one_that_makes_progress_is_left_alone_and_nothing_stays_behind(tmp_path: Path, timeout_s: float) -> None:
    def work() -> None:
        with Watchdog(timeout_s, tmp_path / "log", rank=0) as watchdog:
            for step in range(30):
                watchdog.beat(f"step {step}")
                time.sleep(0.03)
        time.sleep(1.0)  # closed: nobody watches any more

    assert child_process.run(work) == 0
    assert not list(tmp_path.glob("log/*"))
    assert not list(tmp_path.glob("log/.*"))
