"""Restarts of local runs, with real processes; and what is refused before any starts."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from headrace.errors import ConfigError, LayoutError
from launch.attempts import Attempts, Limits, newest_checkpoint
from launch.local import launch_local, run_with_restarts
from launch.preflight import checked_config
from pretrain.processes import StopRequest, start_processes

# Each attempt of rank 0 takes the next line of `plan`: an exit code (-N: kill yourself with signal N), maybe after
# saving a checkpoint.
CHILD = """
import os, sys
from pathlib import Path
here = Path(sys.argv[1])
if os.environ["RANK"] == "0":
    attempts = here / "attempts"
    number = len(attempts.read_text().splitlines()) if attempts.exists() else 0
    with attempts.open("a") as file:
        file.write(os.environ["MASTER_PORT"] + "\\n")
    code, *saved = (here / "plan").read_text().splitlines()[number].split()
    for name in saved:
        (here / "checkpoints" / name).mkdir(parents=True)
    os.kill(os.getpid(), -int(code)) if int(code) < 0 else sys.exit(int(code))
"""


def attempts(here: Path, plan: list[str], limits: Limits, pauses: list[float] | None = None) -> tuple[int, int]:
    """(exit code, attempts made) of a run whose attempts go as `plan` says."""
    (here / "plan").write_text("\n".join(plan))
    command = [sys.executable, "-I", "-S", "-c", CHILD, str(here)]
    pauses = [] if pauses is None else pauses

    def attempt(stop: StopRequest) -> int:
        return start_processes(command, 2, {}, here / "log", 5.0, stop)

    code = run_with_restarts(attempt, Attempts(here), "local", ["here"], 2, limits, pauses.append)
    return code, len((here / "attempts").read_text().splitlines())


@pytest.mark.parametrize("failure", ["4", "5", "-9"])
def test_recoverable_failures_are_run_again(tmp_path: Path, failure: str) -> None:
    assert attempts(tmp_path, [failure, failure, "0"], Limits(2)) == (0, 3)


@pytest.mark.parametrize(("failure", "code"), [("2", 2), ("3", 3)])
def test_what_would_fail_again_is_not(tmp_path: Path, failure: str, code: int) -> None:
    assert attempts(tmp_path, [failure, "0"], Limits(5)) == (code, 1)


def test_it_gives_up_with_the_last_code(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert attempts(tmp_path, ["4", "-9", "5", "0"], Limits(2)) == (5, 3)
    assert "failed 3 times without a new checkpoint" in capfd.readouterr().err


def test_a_new_checkpoint_makes_the_count_start_again(tmp_path: Path) -> None:
    plan = ["4 step_000010", "4 step_000020", "4 step_000030", "4", "0"]
    assert attempts(tmp_path, plan, Limits(2)) == (0, 5)


def test_a_traceback_is_tried_once_more(tmp_path: Path) -> None:
    assert attempts(tmp_path, ["1", "1", "0"], Limits(5)) == (1, 2)


def test_pauses_grow(tmp_path: Path) -> None:
    pauses: list[float] = []
    assert attempts(tmp_path, ["4"] * 8 + ["0"], Limits(8), pauses) == (0, 9)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]


def test_newest_checkpoint_goes_by_number_and_ignores_unfinished_ones(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) == -1
    for name in ("step_9", "step_10", "step_11.partial", "latest"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_checkpoint(tmp_path) == 10


def test_a_run_that_was_asked_to_stop_is_not_restarted(tmp_path: Path) -> None:
    """SIGTERM: the trainer saves and leaves with 4, "there is more to do"; the launcher obeys the person instead."""
    child = """
        import os, signal, sys, time
        from pathlib import Path
        signal.alarm(60)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(4))
        with open(sys.argv[1] + "/ready", "a") as file:
            file.write("x")
        while True:
            time.sleep(0.01)
    """
    command = [sys.executable, "-I", "-S", "-c", textwrap.dedent(child), str(tmp_path)]
    code = (
        "import sys; from pathlib import Path; from launch.attempts import Attempts, Limits\n"
        "from launch.local import run_with_restarts, start_processes\n"
        f"here = Path({str(tmp_path)!r})\n"
        f"attempt = lambda stop: start_processes({command!r}, 2, {{}}, here / 'log', stop=stop)\n"
        "sys.exit(run_with_restarts(attempt, Attempts(here), 'local', ['here'], 2, Limits(), lambda _: None))"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    limit = time.monotonic() + 60
    while not (tmp_path / "ready").exists() or (tmp_path / "ready").stat().st_size < 2:
        assert time.monotonic() < limit
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 4
    assert (tmp_path / "ready").read_text() == "xx"


def test_layouts_that_do_not_fit_are_refused_before_anything_starts(config: Path) -> None:
    assert checked_config(config, ["train.steps=7"], 8).train.steps == 7
    with pytest.raises(LayoutError, match="3 processes"):
        launch_local(config, ["parallel.tensor_parallel_size=2"], 3, Limits())
    with pytest.raises(LayoutError):
        launch_local(config, [], 16, Limits())
    with pytest.raises(ConfigError, match="--nproc"):
        launch_local(config, [], 0, Limits())
    with pytest.raises(ConfigError, match="--max-failures: at least 0, got -1"):
        launch_local(config, [], 1, Limits(max_failures=-1))
    with pytest.raises(ConfigError, match="--max-same-step: at least 1, got 0"):
        launch_local(config, [], 1, Limits(max_same_step=0))
    assert not (config.parent / "runs").exists()


def test_the_trainer_is_started_as_a_module_with_the_overrides(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def note(command: list[str], nproc: int, env: dict[str, str], log_dir: Path, stop: StopRequest) -> int:
        seen.update(command=command, nproc=nproc, log_dir=log_dir)
        return os.EX_OK

    monkeypatch.setattr("launch.local.start_processes", note)
    assert launch_local(config, ["train.steps=3", "run.name=a b"], 2, Limits()) == 0
    assert seen["command"] == [
        *(sys.executable, "-m", "pretrain", "train", str(config), "train.steps=3", "run.name=a b")
    ]
    assert (seen["nproc"], seen["log_dir"]) == (2, Path("runs/mill/log"))
    assert [event["event"] for event in Attempts(Path("runs/mill")).events()] == ["submitted", "start", "end"]


def test_a_run_that_is_cancelled_while_it_pauses_is_not_started_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    notes, tries = Attempts(tmp_path), []

    def attempt(stop: StopRequest) -> int:
        tries.append(stop)
        return 4

    code = run_with_restarts(attempt, notes, "local", ["here"], 1, Limits(9), lambda _: notes.note("cancel"))
    assert (code, len(tries)) == (4, 1)
    assert "cancelled; launch it again to go on" in capfd.readouterr().err
