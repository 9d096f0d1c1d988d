"""The job script runs: with stand-ins for SLURM's programs and real processes."""

import json
import re
import signal
import time
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm
from fake_trainer import job, render

from launch.attempts import Attempts
from launch.request import SlurmRequest
from launch.site import Preflight, Site


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
            "MASTER_PORT": str(12000 + (40123 + 7919) % 20000),
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
        assert (run_dir / "log" / f"rank-{rank}.log").read_text().endswith(f" rank {rank} was here\n")
        assert (run_dir / "log" / f"exit-{rank}").read_text() == "0\n"
    assert "--cpu-bind=none" in (slurm.here / "srun-options").read_text().splitlines()


@pytest.mark.parametrize(
    ("codes", "verdict"),
    [
        ([0, 2, 0, 0], 2),
        ([0, 0, 0, 3], 3),
        ([4, 4, 3, 4], 3),  # peers only lost their connection
    ],
)
def test_what_would_fail_again_ends_the_job(slurm: FakeSlurm, run_dir: Path, codes: list, verdict: int) -> None:
    code, runs, output = slurm.run(job(slurm, run_dir, [codes]), nodes=2)
    assert (code, runs) == (verdict, 1), output
    assert re.search(rf"rank \d .*exit code {verdict}\b", output)


@pytest.mark.parametrize("codes", [[4, "wait", 0, 0], [0, 5, 0, "wait"], ["wait", 137, "wait", "wait"]])
def test_what_may_pass_is_tried_again_in_the_same_job(slurm: FakeSlurm, run_dir: Path, codes: list) -> None:
    code, runs, output = slurm.run(job(slurm, run_dir, [codes, [0, 0, 0, 0]]), nodes=2)
    assert (code, runs) == (0, 1), output
    assert "failure 1 without a new checkpoint" in output
    assert [event["verdict"] for event in ended(run_dir)] == ["again", "finished"]


def ended(run_dir: Path) -> list[dict]:
    return [event for event in Attempts(run_dir).events() if event["event"] == "end"]


def test_a_traceback_is_tried_once_more(slurm: FakeSlurm, run_dir: Path) -> None:
    """A GPU that fell off its bus is one too; the same at the same place again is a fault of the code."""
    failing = ["wait", 1, "wait", "wait"]
    code, _, output = slurm.run(job(slurm, run_dir, [failing, failing]), nodes=2)
    assert code == 1, output
    assert "failed 2 times before the first step; giving up" in output


def test_failing_after_the_same_step_ends_the_run(slurm: FakeSlurm, run_dir: Path) -> None:
    plan = [{"codes": [4, 0, 0, 0], "step": step} for step in (7, 9, 9)]
    code, _, output = slurm.run(job(slurm, run_dir, plan, max_failures=9), nodes=2)
    assert code == 4, output
    assert "failed 2 times after step 9; giving up" in output


def test_lost_processes_are_tried_again(slurm: FakeSlurm, run_dir: Path) -> None:
    """They leave no note; what their peers report is not the reason."""
    code, _, output = slurm.run(job(slurm, run_dir, [["wait", "peer", "kill", "kill"], [0, 0, 0, 0]]), nodes=2)
    assert code == 0, output
    assert "2 of 4 processes left no exit code" in output


def test_a_job_that_died_with_its_node_counts_as_a_failure(slurm: FakeSlurm, run_dir: Path) -> None:
    """SLURM has put the job back into the queue; nobody could note how the attempt ended."""
    Attempts(run_dir).note("submitted", jobs=["40123"])
    for _ in range(2):
        Attempts(run_dir).start("slurm", "40123", ["other"], 4)
    code, _, output = slurm.run(job(slurm, run_dir, [None, None, [0] * 4]), nodes=2)
    assert code == 0, output
    assert "the attempt was cut off: a node was lost" in output
    assert [event["verdict"] for event in ended(run_dir)] == ["again", "finished"]


def test_it_gives_up_without_progress(slurm: FakeSlurm, run_dir: Path) -> None:
    code, runs, output = slurm.run(job(slurm, run_dir, [[5, 0, 0, 0]] * 5, max_failures=2), nodes=2)
    assert (code, runs) == (5, 1), output
    assert "failed 3 times without a new checkpoint; giving up" in output
    again = slurm.start(run_dir / "job.sh", nodes=2, restarts=1)
    assert "launch it again to go on" in again.communicate()[0]
    assert again.returncode == 5


def test_a_new_checkpoint_makes_the_count_start_again(slurm: FakeSlurm, run_dir: Path) -> None:
    failing = [4, 0, 0, 0]
    plan = [
        failing,
        {"codes": failing, "saves": ["step_0000009"]},
        {"codes": failing, "saves": ["step_0000010"]},
        failing,
        failing,
    ]
    code, _, output = slurm.run(job(slurm, run_dir, plan, max_failures=2), nodes=2)
    assert code == 4, output
    assert len(ended(run_dir)) == 5


def test_a_bad_node_is_replaced_by_a_spare(slurm: FakeSlurm, run_dir: Path) -> None:
    bad = "other-1.invalid"
    site = Site(preflight=Preflight(commands=[f'[ "$SLURMD_NODENAME" != {bad} ] || {{ echo fan stopped; false; }}']))
    script = job(slurm, run_dir, [[0] * 4], site, spares=1)
    code, _, output = slurm.run(script, nodes=3)
    assert code == 0, output
    assert f"bad nodes: {bad}: " in output
    assert "fan stopped" in output
    (start,) = [event for event in Attempts(run_dir).events() if event["event"] == "start"]
    assert start["nodes"] == ["no-such-node.invalid", "other-2.invalid"]
    assert "--overlap" in (slurm.here / "srun-options").read_text().splitlines()
    assert "#SBATCH --nodes=2-3\n" in script.read_text()
    assert "#SBATCH --no-kill\n" in script.read_text()


def test_a_lost_node_is_replaced_by_a_spare(slurm: FakeSlurm, run_dir: Path) -> None:
    (slurm.here / "down").write_text("no-such-node.invalid")
    code, _, output = slurm.run(job(slurm, run_dir, [[0] * 4], spares=1), nodes=3)
    assert code == 0, output
    assert "attempt 1: 4 processes on other-1.invalid,other-2.invalid" in output


def test_without_enough_good_nodes_the_next_job_avoids_the_bad(slurm: FakeSlurm, run_dir: Path) -> None:
    site = Site(preflight=Preflight(commands=["[ $SLURMD_NODENAME != other-1.invalid ]"]))
    code, _, output = slurm.run(job(slurm, run_dir, [[0] * 4], site), nodes=2)
    assert code == 4, output
    assert slurm.sbatch_options() == ["--exclude=other-1.invalid"]
    assert "job 4711 goes on" in output
    kinds = [event["event"] for event in Attempts(run_dir).events()]
    assert kinds == ["submitted", "bad_node", "resubmitted"]


def test_a_path_that_no_node_has_is_the_runs_mistake(slurm: FakeSlurm, run_dir: Path) -> None:
    script = job(slurm, run_dir, [[0] * 4])
    checks = run_dir / "launch" / "0001" / "checks.json"
    checks.write_text(json.dumps(json.loads(checks.read_text()) | {"read": ["/no/such/data"]}))
    code, _, output = slurm.run(script, nodes=2)
    assert code == 2, output
    assert "/no/such/data: no such file here (on no-such-node.invalid and other-1.invalid)" in output
    assert slurm.sbatch_options() == []
    assert [event["verdict"] for event in ended(run_dir)] == ["stop"]


def test_a_mistyped_path_does_not_walk_through_the_cluster(slurm: FakeSlurm, run_dir: Path) -> None:
    """A job of one node: the first has it excluded, the second one shows whose fault it is."""
    script = job(slurm, run_dir, [[0] * 2], nodes=1)
    checks = run_dir / "launch" / "0001" / "checks.json"
    checks.write_text(json.dumps(json.loads(checks.read_text()) | {"read": ["/no/such/data"]}))
    code, _, output = slurm.run(script, nodes=1)
    assert (code, slurm.sbatch_options()) == (4, ["--exclude=no-such-node.invalid"]), output
    process = slurm.start(script, nodes=1, SLURM_JOB_ID="4711", SLURM_JOB_NODELIST="other")
    output = process.communicate()[0]
    assert process.returncode == 2, output


def test_a_chain_is_told_to_avoid_bad_nodes(slurm: FakeSlurm, run_dir: Path) -> None:
    """And no further job is submitted, which would train beside the chain's next."""
    site = Site(preflight=Preflight(commands=["[ $SLURMD_NODENAME != other-1.invalid ]"]))
    script = job(slurm, run_dir, [[0] * 4], site, chain=2)
    (run_dir / "launch" / "0001" / "job-id").write_text("40123\n40124\n")
    code, _, output = slurm.run(script, nodes=2)
    assert code == 4, output
    assert slurm.sbatch_options() == []
    assert (slurm.here / "updated").read_text() == "JobId=40124 ExcNodeList=other-1.invalid\n"


def test_two_jobs_never_train_one_run(slurm: FakeSlurm, run_dir: Path) -> None:
    slurm.program("squeue", '#!/bin/sh\n[ "$3" = 39999 ] && echo RUNNING\n')
    Attempts(run_dir).start("slurm", "39999", ["elsewhere"], 4)
    code, _, output = slurm.run(job(slurm, run_dir, [[0] * 4]), nodes=2)
    assert code == 2, output
    assert "job 39999 trains this run already" in output


def test_a_range_of_nodes_uses_what_the_layout_allows(slurm: FakeSlurm, run_dir: Path) -> None:
    site = Site(preflight=Preflight(commands=["[ $SLURMD_NODENAME != other-1.invalid ]"]))
    script = job(slurm, run_dir, [[0] * 4], site, nodes=4, min_nodes=1)
    text = script.read_text().replace("NODE_COUNTS=4", "NODE_COUNTS='1 2 4'")
    assert "#SBATCH --nodes=1-4\n" in text
    assert "#SBATCH --mincpus=2\n" in text
    assert "--ntasks-per-node=2\n" not in text
    script.write_text(text)
    code, _, output = slurm.run(script, nodes=4)
    assert code == 0, output
    assert "attempt 1: 4 processes on no-such-node.invalid,other-2.invalid" in output


def test_a_chain_leaves_the_rest_to_its_next_job(slurm: FakeSlurm, run_dir: Path) -> None:
    script = job(slurm, run_dir, [["save"] * 4, [0, 0, 0, 0]], chain=3)
    Attempts(run_dir).note("submitted", jobs=["40123", "40124", "40125"])
    process = slurm.start(script, nodes=2)
    wait_for(slurm)
    process.send_signal(signal.SIGUSR1)
    assert "the next job of the chain goes on" in process.communicate()[0]
    assert process.returncode == 4
    assert not slurm.was_requeued()
    for number in ("40124", "40125"):  # the last one has nothing left to do
        process = slurm.start(script, nodes=2, SLURM_JOB_ID=number)
        output = process.communicate()[0]
        assert process.returncode == 0, output
    assert "the run is finished" in output


def test_the_time_limit_saves_and_requeues_without_counting_as_a_failure(slurm: FakeSlurm, run_dir: Path) -> None:
    script = job(slurm, run_dir, [["save"] * 4, [0, 0, 0, 0]])
    process = slurm.start(script, nodes=2)
    wait_for(slurm)
    process.send_signal(signal.SIGUSR1)
    output = process.communicate()[0]
    assert slurm.was_requeued(), output
    assert [(slurm.here / f"saved-{rank}").read_text() for rank in range(4)] == ["USR1"] * 4
    assert "the time limit" in output
    assert [event["verdict"] for event in ended(run_dir)] == ["saved"]
    process = slurm.start(script, nodes=2, restarts=1)
    assert "attempt 2: 4 processes" in process.communicate()[0]
    assert process.returncode == 0


def test_the_time_limit_ends_a_check_of_nodes_that_takes_longer(slurm: FakeSlurm, run_dir: Path) -> None:
    began = slurm.here / "check-began"
    site = Site(preflight=Preflight(commands=[f"touch {began}; sleep 600"]))
    process = slurm.start(job(slurm, run_dir, [[0] * 4], site), nodes=2)
    limit = time.monotonic() + 120
    while not began.exists():
        assert time.monotonic() < limit
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    output = process.communicate(timeout=120)[0]
    assert slurm.was_requeued(), output
    assert "requeue: the time limit" in output
    assert ended(run_dir) == []  # which is no failure, and no node's fault
    assert not list((run_dir / "launch").glob("*/exclude"))


def wait_for(slurm: FakeSlurm) -> None:
    """Until all four processes run."""
    limit = time.monotonic() + 120
    while not all((slurm.here / f"started-0-{rank}").exists() for rank in range(4)):
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_a_refused_requeue_submits_the_next_job(slurm: FakeSlurm, run_dir: Path) -> None:
    (slurm.here / "no-requeue").touch()
    process = slurm.start(job(slurm, run_dir, [["save"] * 4]), nodes=2)
    wait_for(slurm)
    process.send_signal(signal.SIGUSR1)
    output = process.communicate()[0]
    assert process.returncode == 4
    assert "job 4711 goes on" in output


def test_notes_of_an_earlier_run_are_not_believed(slurm: FakeSlurm, run_dir: Path) -> None:
    """Neither exit codes of processes that now leave none, nor whose failure was the first last time."""
    for rank in range(8):
        (run_dir / "log" / f"exit-{rank}").write_text("3\n")
    plan = [["wait", "peer", "kill", "kill"], ["wait", 4, "wait", "wait"], [0, 0, 0, 0]]
    code, _, output = slurm.run(job(slurm, run_dir, plan), nodes=2)
    assert code == 0, output
    assert [event["lost"] for event in ended(run_dir)] == [True, False, False]


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
    assert "PYTHON=python3\n" in render(request, run_dir, Site())


def test_setup_lines_run_first_and_may_use_unset_variables(slurm: FakeSlurm, run_dir: Path) -> None:
    site = Site(setup=['echo "setup says $NO_SUCH_VARIABLE hello"'])
    code, _, output = slurm.run(job(slurm, run_dir, [[0] * 4], site), nodes=2)
    assert code == 0
    assert "setup says  hello" in output
    assert output.index("setup says") < output.index("attempt 1")


def test_apptainer_wraps_the_command(slurm: FakeSlurm, run_dir: Path) -> None:
    slurm.program("apptainer", '#!/bin/bash\necho "$@" >>"$FAKE_SLURM/apptainer"\nexec "${@:8}"\n')
    site = Site(container_runtime="apptainer", container="/img/a b.sif", preflight=Preflight(enabled=False))
    code, _, output = slurm.run(job(slurm, run_dir, [[0] * 4], site), nodes=2)
    assert code == 0, output
    parent = run_dir.parent
    said = (slurm.here / "apptainer").read_text().splitlines()
    assert len(said) == 4
    mounts = f"--bind {run_dir}:{run_dir},{parent}:{parent} --pwd {parent} /img/a b.sif"
    assert said[0].startswith(f"exec --nv {mounts} {slurm.here}/bin/trainer -P -m pretrain train ")


def test_site_settings_reach_the_processes(slurm: FakeSlurm, run_dir: Path) -> None:
    site = Site(modules=["cuda/12.8", "a b"], setup=["env >$FAKE_SLURM/environment"], network_interface="ib0")
    site = site.model_copy(update={"nccl": {"IB_HCA": "mlx5"}, "environment": {"MILL": "x"}})
    script = job(slurm, run_dir, [[0] * 4], site)
    text = script.read_text().replace("set -u\n", 'set -u\nmodule() { echo "module $*"; }\n', 1)
    script.write_text(text)
    code, _, output = slurm.run(script, nodes=2)
    assert code == 0, output
    assert "module load cuda/12.8\nmodule load a b\n" in output
    for line in ("NCCL_SOCKET_IFNAME=ib0", "GLOO_SOCKET_IFNAME=ib0", "NCCL_IB_HCA=mlx5", "MILL=x"):
        assert f"export {line}\n" in text
