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
from launch.local import launch_local, newest_checkpoint, run_with_restarts
from launch.preflight import checked_config

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


def attempts(here: Path, plan: list[str], max_restarts: int, pauses: list[float] | None = None) -> tuple[int, int]:
    """(exit code, attempts made) of a run whose attempts go as `plan` says."""
    (here / "plan").write_text("\n".join(plan))
    command = [sys.executable, "-I", "-S", "-c", CHILD, str(here)]
    pauses = [] if pauses is None else pauses
    code = run_with_restarts(command, 2, here, max_restarts, grace_s=5.0, pause=pauses.append)
    return code, len((here / "attempts").read_text().splitlines())


@pytest.mark.parametrize("failure", ["4", "5", "-9"])
def test_recoverable_failures_are_run_again(tmp_path: Path, failure: str) -> None:
    assert attempts(tmp_path, [failure, failure, "0"], max_restarts=2) == (0, 3)


@pytest.mark.parametrize(("failure", "code"), [("2", 2), ("3", 3), ("1", 1)])
def test_what_would_fail_again_is_not(tmp_path: Path, failure: str, code: int) -> None:
    assert attempts(tmp_path, [failure, "0"], max_restarts=5) == (code, 1)


def test_it_gives_up_with_the_last_code(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert attempts(tmp_path, ["4", "-9", "5", "0"], max_restarts=2) == (5, 3)
    assert "failed 3 times without a new checkpoint" in capfd.readouterr().err


def test_a_new_checkpoint_makes_the_count_start_again(tmp_path: Path) -> None:
    plan = ["4 step_000010", "4 step_000020", "4 step_000030", "4", "0"]
    assert attempts(tmp_path, plan, max_restarts=2) == (0, 5)


def test_pauses_grow(tmp_path: Path) -> None:
    pauses: list[float] = []
    assert attempts(tmp_path, ["4"] * 8 + ["0"], max_restarts=8, pauses=pauses) == (0, 9)
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
        "import sys; from pathlib import Path; from launch.local import run_with_restarts\n"
        f"sys.exit(run_with_restarts({command!r}, 2, Path({str(tmp_path)!r}), 3, pause=lambda _: None))"
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
        launch_local(config, ["parallel.tensor_parallel_size=2"], 3, 0)
    with pytest.raises(LayoutError):
        launch_local(config, [], 16, 0)
    with pytest.raises(ConfigError, match="--nproc"):
        launch_local(config, [], 0, 0)
    with pytest.raises(ConfigError, match="--max-restarts: at least 0, got -1"):
        launch_local(config, [], 1, -1)
    assert not (config.parent / "runs").exists()


def test_the_trainer_is_started_as_a_module_with_the_overrides(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def note(command: list[str], nproc: int, run_dir: Path, max_restarts: int) -> int:
        seen.update(command=command, nproc=nproc, run_dir=run_dir, max_restarts=max_restarts)
        return os.EX_OK

    monkeypatch.setattr("launch.local.run_with_restarts", note)
    assert launch_local(config, ["train.steps=3", "run.name=a b"], 2, 5) == 0
    assert seen["command"] == [
        *(sys.executable, "-m", "pretrain", "train", str(config), "train.steps=3", "run.name=a b")
    ]
    assert (seen["nproc"], seen["run_dir"], seen["max_restarts"]) == (2, Path("runs/mill"), 5)
