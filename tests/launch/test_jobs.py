"""What people are told about launched runs: status, logs, cancel, attach; and what a sweep is made of."""

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest
from fake_slurm import PYTHON, FakeSlurm
from typer.testing import CliRunner

from headrace.errors import ConfigError
from launch import logs, sweep_cli
from launch.attempts import AGAIN, STOP, Attempts, Limits, Outcome
from launch.cli import app
from launch.jobs import as_text, attach_command, cancel, job_ids, status_of
from launch.request import SlurmRequest
from launch.site import Site
from launch.sweep import grid, launch_sweep
from pretrain.config import load_config

SQUEUE = """
import os
from pathlib import Path
print((Path(os.environ["FAKE_SLURM"]) / "queue").read_text(), end="")
"""
SCANCEL = """
import os, sys
from pathlib import Path
with (Path(os.environ["FAKE_SLURM"]) / "cancelled").open("a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
"""


@pytest.fixture
def queue(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What squeue prints."""
    slurm.program("squeue", PYTHON + SQUEUE)
    slurm.program("scancel", PYTHON + SCANCEL)
    for name, value in slurm.environment().items():
        monkeypatch.setenv(name, value)
    path = slurm.here / "queue"
    path.write_text("")
    return path


def begun(run_dir: Path) -> Attempts:
    """A run whose job 7 trains."""
    (run_dir / "config.yaml").write_text("train: {steps: 20}\n")
    attempts = Attempts(run_dir)
    attempts.note("submitted", jobs=["7", "8"])
    attempts.start("slurm", "7", ["a", "b"], 4)
    (run_dir / "metrics.jsonl").write_text('{"step": 9, "loss": 1.0}\n')
    return attempts


def test_a_running_run(run_dir: Path, queue: Path) -> None:
    begun(run_dir)
    queue.write_text("7|7|RUNNING|None|a,b|1:02\n8|8|PENDING|Dependency||0:00\n9|9|RUNNING|None|c|9:99\n")
    status = status_of(run_dir)
    assert (status.word, status.exit_code, status.step, status.steps) == ("running", 0, 9, 20)
    text = as_text(status)
    assert "running, 10 of 20 steps, no checkpoint" in text
    assert "job 7: RUNNING on a,b for 1:02" in text
    assert "job 8: PENDING because Dependency" in text
    assert "attempt 1 (slurm 7): 4 processes on a,b" in text
    assert "job 9" not in text


def test_a_run_whose_job_is_back_in_the_queue_waits(run_dir: Path, queue: Path) -> None:
    begun(run_dir)
    queue.write_text("7|7|PENDING|Resources||0:00\n")
    assert status_of(run_dir).word == "waiting"


def test_a_run_that_failed_gives_its_exit_code(run_dir: Path, queue: Path) -> None:
    begun(run_dir).end(Outcome(STOP, 3, "rank 1 left with exit code 3"), Limits(), "7")
    result = CliRunner().invoke(app, ["status", str(run_dir)])
    assert result.exit_code == 3
    assert "stopped, 10 of 20 steps" in result.output
    assert "stop: rank 1 left with exit code 3" in result.output


def test_a_folder_without_a_launch_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing was launched there"):
        status_of(tmp_path)


def test_a_job_that_took_anothers_place_is_followed(run_dir: Path, queue: Path) -> None:
    begun(run_dir).note("resubmitted", job="12", instead_of="7")
    assert job_ids(run_dir) == ["7", "8", "12"]


def test_cancel_saves_first(run_dir: Path, queue: Path) -> None:
    attempts = begun(run_dir)
    queue.write_text("7|7|RUNNING|None|a,b|1:02\n8|8|PENDING|Dependency||0:00\n")
    assert cancel(run_dir, now=False) == "asked to end after saving: 7 8"
    assert (queue.parent / "cancelled").read_text() == "--state=PENDING 8\n--batch --signal=USR1 7\n"
    assert attempts.end(Outcome(AGAIN, 4), Limits(), "7", saved=True).verdict == STOP
    queue.write_text("")
    assert cancel(run_dir, now=False) == "nothing of it runs or waits"


def test_cancel_now(run_dir: Path, queue: Path) -> None:
    begun(run_dir)
    queue.write_text("7|7|RUNNING|None|a,b|1:02\n8|8|PENDING|Dependency||0:00\n")
    cancel(run_dir, now=True)
    assert (queue.parent / "cancelled").read_text() == "--state=PENDING 8\n7\n"


def test_cancelling_the_waiting_tasks_of_an_array_leaves_the_running_ones_time_to_save(
    run_dir: Path, queue: Path
) -> None:
    """Tasks that wait are called by the array's number; one that runs may have the same."""
    begun(run_dir)
    queue.write_text("7|7|RUNNING|None|a|1:02\n7|7|PENDING|Resources||0:00\n7|7|PENDING|Resources||0:00\n")
    cancel(run_dir, now=False)
    assert (queue.parent / "cancelled").read_text() == "--state=PENDING 7\n--batch --signal=USR1 7\n"


def test_a_run_that_was_cut_off_does_not_run(run_dir: Path, queue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(run_dir)
    status = status_of(run_dir)
    assert (status.word, status.exit_code) == ("stopped", 4)
    monkeypatch.setenv("PATH", "/nowhere")  # without SLURM nobody knows
    assert status_of(run_dir).word == "running"


def test_a_local_launcher_that_was_killed_runs_no_more(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    dead = subprocess.Popen(["true"])
    dead.wait()
    for pid, word in ((os.getpid(), "running"), (dead.pid, "stopped")):
        job = f"{socket.gethostname()}:{pid}"
        attempts.note("submitted", launcher="local", jobs=[job])
        attempts.start("local", job, [socket.gethostname()], 1)
        assert status_of(tmp_path).word == word


def test_attach_opens_a_shell_in_the_running_job(run_dir: Path, queue: Path) -> None:
    begun(run_dir)
    with pytest.raises(ConfigError, match="no job of it runs now"):
        attach_command(run_dir, "")
    queue.write_text("7|7|RUNNING|None|a,b|1:02\n")
    command = attach_command(run_dir, "b")
    assert {"--jobid=7", "--overlap", "--nodelist=b", "--pty"} <= set(command)


def test_logs_are_merged_by_time(run_dir: Path) -> None:
    folder = run_dir / "log"
    (folder / "rank-0.log").write_text("2026-01-01 00:00:01.500 zero\n  more of it\n2026-01-01 00:00:03.000 end\n")
    (folder / "rank-1.log").write_text("2026-01-01 00:00:02.000 one\n2026-01-01 00:00:01.000 clock set back\n")
    (folder / "slurm-7.log").write_text("2026-01-01 00:00:01 headrace: attempt 1\n")
    lines = list(logs.merged(logs.log_files(run_dir, None)))
    assert [[line[:6], line[8:]] for line in lines] == [
        ["job 7 ", "2026-01-01 00:00:01 headrace: attempt 1"],
        ["rank 0", "2026-01-01 00:00:01.500 zero"],
        ["rank 0", "  more of it"],
        ["rank 1", "2026-01-01 00:00:02.000 one"],
        ["rank 1", "2026-01-01 00:00:01.000 clock set back"],
        ["rank 0", "2026-01-01 00:00:03.000 end"],
    ]
    assert list(logs.merged(logs.log_files(run_dir, [1]), last=1)) == ["rank 1  2026-01-01 00:00:01.000 clock set back"]
    shown = list(logs.one_after_the_other(logs.log_files(run_dir, [0]), 1))
    assert shown == [f"--- rank 0: {folder / 'rank-0.log'}", "2026-01-01 00:00:03.000 end"]
    with pytest.raises(ConfigError, match="no log of these ranks"):
        logs.log_files(run_dir, [5])


def test_following_shows_new_lines_until_the_end(run_dir: Path) -> None:
    path = run_dir / "log" / "rank-0.log"
    path.write_text("old\n")
    pauses = 0

    def pause(seconds: float) -> None:
        nonlocal pauses
        pauses += 1
        with path.open("a") as file:
            file.write("new\nhalf" if pauses == 1 else " a line\n")

    lines = logs.follow(lambda: logs.log_files(run_dir, None), lambda: pauses == 2, pause)
    assert list(lines) == ["rank 0  new", "rank 0  half a line"]


def test_every_combination_is_a_point() -> None:
    points = grid(["a.b=[1, 2]", "c=[x, [y, z]]"])
    assert [point.settings for point in points] == [
        {"a.b": 1, "c": "x"},
        {"a.b": 1, "c": ["y", "z"]},
        {"a.b": 2, "c": "x"},
        {"a.b": 2, "c": ["y", "z"]},
    ]
    assert points[3].overrides == ["a.b=2", 'c=["y", "z"]']


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ([], "--vary is missing"),
        (["a"], "write KEY="),
        (["a=1"], "write KEY="),
        (["a=[1"], "write KEY="),
        (["a=[1]", "a=[2]"], "stands twice"),
        (["run.dir=[x]"], "gets a folder of its own"),
        ([f"a={list(range(40))}", f"b={list(range(40))}"], "1600 runs are too many"),
    ],
)
def test_bad_sweeps_are_refused(vary: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        grid(vary)


def test_a_sweep_writes_a_configuration_for_every_run(config: Path, queue: Path, tmp_path: Path) -> None:
    vary = ["optimizer.lr=[1e-3,3e-3]", "model.num_layers=[2,4]"]
    overrides = ["train.steps=9", "checkpoint.copy_to=s3://bucket/mill"]
    done = launch_sweep(config, overrides, vary, SlurmRequest(2, 4), Site(), at_once=3)
    assert done.jobs == ["4711"]
    folder = tmp_path / "runs" / "mill"
    table = json.loads((folder / "sweep.json").read_text())
    assert table[2] == {"run": "0002", "optimizer.lr": 3e-3, "model.num_layers": 2}
    found = load_config(done.snapshot / "points" / "0002.yaml")
    assert (found.optimizer.lr, found.model.num_layers, found.train.steps) == (3e-3, 2, 9)
    assert found.run.dir == str(folder / "0002")
    assert found.checkpoint.copy_to == "s3://bucket/mill/0002"
    assert 'scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"' in done.script
    assert "#SBATCH --array=0-3%3\n" in done.script
    result = CliRunner().invoke(app, ["status", str(folder)])
    assert result.output.splitlines()[2] == "0002  not started  optimizer.lr=0.003, model.num_layers=2"


def test_a_sweep_with_one_impossible_run_submits_none(config: Path, queue: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.num_layers"):
        launch_sweep(config, [], ["model.num_layers=[2,-1]"], SlurmRequest(2, 4), Site())
    assert not (tmp_path / "runs").exists()


def test_the_commands_say_where_to_look(config: Path, queue: Path, tmp_path: Path) -> None:
    vary = ["--vary", "optimizer.lr=[1e-3,3e-3]", "train.steps=9", "--gpus-per-node", "2"]
    shown = CliRunner().invoke(sweep_cli.app, [str(config), *vary, "--dry-run"])
    assert shown.exit_code == 0, shown.output
    assert "#SBATCH --array=0-1\n" in shown.output
    assert not (tmp_path / "runs").exists()
    done = CliRunner().invoke(sweep_cli.app, [str(config), *vary])
    assert done.output.startswith("submitted array job 4711;")
    launched = CliRunner().invoke(app, ["slurm", str(config), "--gpus-per-node", "4", "--chain", "2", "run.dir=runs/b"])
    assert launched.output.startswith("submitted job 4711 4711\n")
    assert f"headrace launch status {tmp_path}/runs/b" in launched.output
    options = (queue.parent / "sbatch-options").read_text().splitlines()
    assert options[-2:] == ["", "--dependency=afterany:4711"]
    assert [event["event"] for event in Attempts(tmp_path / "runs" / "b").events()] == ["submitted", "jobs"]
