"""A process that hangs says where, and ends."""

import ctypes
import signal
import time
from pathlib import Path

import child_process
import pytest

from headrace.errors import ExitCode
from pretrain.recovery.watchdog import Watchdog


def stuck_here(seconds: float) -> None:
    time.sleep(seconds)


def test_a_hang_is_reported_with_stacks_and_ends_with_its_code(tmp_path: Path) -> None:
    def hang() -> None:
        told = {"data loader": lambda: "next step 7", "broken": lambda: 1 // 0}
        with Watchdog(0.5, tmp_path, rank=3, more=told) as watchdog:  # type: ignore[arg-type]
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
