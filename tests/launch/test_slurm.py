"""The job script runs: with stand-ins for SLURM's programs and real processes."""

import json
import re
import signal
import time
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm
from fake_trainer import job

from launch.site import Site
from launch.slurm import SlurmRequest, render_script


def test_every_process_finds_its_place(slurm: FakeSlurm, run_dir: Path) -> None:
    script = job(slurm, run_dir, [[0, 0, 0, 0]], Site(environment={"MILL": "a 'b' $c"}, srun=["--cpu-bind=none"]))
    code, runs, output = slurm.run(script, nodes=2)
    assert (code, runs) == (0, 1), output
    seen = [json.loads((slurm.here / f"seen-{rank}").read_text()) for rank in range(4)]
    assert seen == [
        {
            "RANK": str(rank),
            "WORLD_SIZE": "4",
            "LOCAL_RANK": str(rank % 2),
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "10.1.2.3",  # the node's name does not resolve: SLURM's own address of it
            "MASTER_PORT": str(12000 + 40123 % 20000),
            "OMP_NUM_THREADS": "1",
            "argv": ["-P", "-m", "pretrain", "train", str(run_dir / "launch" / "0001" / "config.yaml")],
            "cwd": str(run_dir.parent),
            "PYTHONPATH": seen[0]["PYTHONPATH"],
            "MILL": "a 'b' $c",
        }
        for rank in range(4)
    ]
    assert seen[0]["PYTHONPATH"].split(":")[0] == str(run_dir / "launch" / "0001" / "code")
    for rank in range(4):
        assert (run_dir / "log" / f"rank-{rank}.log").read_text() == f"rank {rank} was here\n"
        assert (run_dir / "log" / f"exit-{rank}").read_text() == "0\n"
    assert "--cpu-bind=none" in (slurm.here / "srun-options").read_text().splitlines()


@pytest.mark.parametrize(
    ("codes", "verdict"),
    [
        ([0, 2, 0, 0], 2),
        ([0, 0, 0, 3], 3),
        ([4, 4, 3, 4], 3),  # peers only lost their connection
        (["wait", 1, "wait", "wait"], 1),  # a fault of ours: the same again next time
    ],
)
def test_what_would_fail_again_ends_the_job(slurm: FakeSlurm, run_dir: Path, codes: list, verdict: int) -> None:
    code, runs, output = slurm.run(job(slurm, run_dir, [codes]), nodes=2)
    assert (code, runs) == (verdict, 1), output
    assert re.search(rf"rank \d .*exit code {verdict}, see {re.escape(str(run_dir))}/log/rank-\d.log", output)


@pytest.mark.parametrize("codes", [[4, "wait", 0, 0], [0, 5, 0, "wait"], ["wait", 137, "wait", "wait"]])
def test_what_may_pass_is_requeued(slurm: FakeSlurm, run_dir: Path, codes: list) -> None:
    code, runs, output = slurm.run(job(slurm, run_dir, [codes, [0, 0, 0, 0]]), nodes=2)
    assert (code, runs) == (0, 2), output
    assert "failure 1 of at most 3" in output
    assert not (run_dir / "log" / "failures").exists()


def test_a_lost_node_is_requeued(slurm: FakeSlurm, run_dir: Path) -> None:
    """Its processes leave no note; what their peers report is not the reason."""
    code, runs, output = slurm.run(job(slurm, run_dir, [["wait", "peer", "kill", "kill"], [0, 0, 0, 0]]), nodes=2)
    assert (code, runs) == (0, 2), output
    assert "2 of 4 processes left no exit code" in output


def test_it_gives_up_without_progress(slurm: FakeSlurm, run_dir: Path) -> None:
    code, runs, output = slurm.run(job(slurm, run_dir, [[5, 0, 0, 0]] * 5, max_failures=2), nodes=2)
    assert (code, runs) == (5, 3), output
    assert "failed 3 times without a new checkpoint; giving up" in output


def test_a_new_checkpoint_makes_the_count_start_again(slurm: FakeSlurm, run_dir: Path) -> None:
    failing = [4, 0, 0, 0]
    plan = [
        failing,
        {"codes": failing, "saves": ["step_0000009"]},
        {"codes": failing, "saves": ["step_0000010"]},
        failing,
        failing,
    ]
    code, runs, output = slurm.run(job(slurm, run_dir, plan, max_failures=2), nodes=2)
    assert (code, runs) == (4, 5), output


def test_the_time_limit_saves_and_requeues_without_counting_as_a_failure(slurm: FakeSlurm, run_dir: Path) -> None:
    script = job(slurm, run_dir, [["save"] * 4, [0, 0, 0, 0]])
    process = slurm.start(script, nodes=2)
    limit = time.monotonic() + 60
    while not all((slurm.here / f"seen-{rank}").exists() for rank in range(4)):
        assert time.monotonic() < limit
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    output = process.communicate()[0]
    assert slurm.was_requeued(), output
    assert [(slurm.here / f"saved-{rank}").read_text() for rank in range(4)] == ["USR1"] * 4
    assert "the time limit" in output
    assert not (run_dir / "log" / "failures").exists()
    process = slurm.start(script, nodes=2, restarts=1)
    assert "start 1: 4 processes" in process.communicate()[0]
    assert process.returncode == 0


def test_a_refused_requeue_says_what_to_do(slurm: FakeSlurm, run_dir: Path) -> None:
    (slurm.here / "no-requeue").touch()
    code, runs, output = slurm.run(job(slurm, run_dir, [[4, 0, 0, 0]]), nodes=2)
    assert (code, runs) == (4, 1)
    assert "submit it again with: sbatch" in output


def test_notes_of_an_earlier_run_are_not_believed(slurm: FakeSlurm, run_dir: Path) -> None:
    """Neither exit codes of processes that now leave none, nor whose failure was the first last time."""
    for rank in range(8):
        (run_dir / "log" / f"exit-{rank}").write_text("3\n")
    plan = [["wait", "peer", "kill", "kill"], ["wait", 4, "wait", "wait"], [0, 0, 0, 0]]
    code, runs, output = slurm.run(job(slurm, run_dir, plan), nodes=2)
    assert (code, runs) == (0, 3), output


def test_heterogeneous_jobs_are_refused(slurm: FakeSlurm, run_dir: Path) -> None:
    process = slurm.start(job(slurm, run_dir, [[0] * 4]), nodes=2, SLURM_HET_SIZE="2")
    assert "heterogeneous jobs are not supported" in process.communicate()[0]
    assert process.returncode == 2


def test_cpu_clusters_choose_their_number_of_processes(slurm: FakeSlurm, run_dir: Path) -> None:
    script = job(slurm, run_dir, [[0, 0, 0]], nodes=1, gpus_per_node=0, tasks_per_node=3)
    assert "gres" not in script.read_text()
    code, _, output = slurm.run(script, nodes=1)
    assert code == 0, output
    assert json.loads((slurm.here / "seen-2").read_text())["WORLD_SIZE"] == "3"


def test_a_container_gets_its_image_and_mounts(slurm: FakeSlurm, run_dir: Path) -> None:
    site = Site(container_mounts=["/data:/data:ro"])
    code, _, output = slurm.run(job(slurm, run_dir, [[0] * 4], site, container="/img/a b.sqsh"), nodes=2)
    assert code == 0, output
    options = (slurm.here / "srun-options").read_text().splitlines()
    assert "--container-image=/img/a b.sqsh" in options
    parent = run_dir.parent
    assert f"--container-mounts={run_dir}:{run_dir},{parent}:{parent},/data:/data:ro" in options
    assert f"--container-workdir={parent}" in options
    request = SlurmRequest(nodes=1, gpus_per_node=1, container="x")
    assert "COMMAND=(python3 " in render_script(request, run_dir, run_dir / "launch" / "0001", parent, Site())


def test_setup_lines_run_first_and_may_use_unset_variables(slurm: FakeSlurm, run_dir: Path) -> None:
    site = Site(setup=['echo "setup says $NO_SUCH_VARIABLE hello"'])
    code, _, output = slurm.run(job(slurm, run_dir, [[0] * 4], site), nodes=2)
    assert code == 0
    assert "setup says  hello" in output
    assert output.index("setup says") < output.index("start 0")
