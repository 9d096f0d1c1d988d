"""Runs on a real SLURM cluster, interrupted in every way, train on the tokens of the uninterrupted run."""

import json
import sys
from pathlib import Path

import pytest
from lab_run import STEPS, attempts, hashes, train_here, verdicts, write_config
from warm_python import Server

from launch.jobs import status_of, sweep_runs
from launch.request import SlurmRequest
from launch.site import Preflight, Site
from launch.slurm import launch_slurm
from launch.sweep import launch_sweep

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

PREFLIGHT = Preflight(min_free_gb=0.001, max_clock_skew_s=120)


@pytest.fixture(scope="module")
def site(warm: Server) -> Site:
    return Site(
        sbatch={"mem": 100},
        preflight=PREFLIGHT,
        python=warm.python,
        batch_python=sys.executable,
        environment=warm.environment,
    )


@pytest.fixture(scope="module")
def uninterrupted(warm: Server, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, str]]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    train_here(warm.python, warm.environment, write_config(corpus, folder / "run.yaml", folder / "run"))
    found = hashes(folder / "run")
    assert len(found) == STEPS
    return found


def test_the_time_limit_saves_requeues_and_resumes(
    cluster, site: Site, corpus: Path, tmp_path: Path, uninterrupted
) -> None:
    """2 nodes with 2 processes each; `scancel --batch -s USR1` is what SLURM does before the time limit."""
    run_dir = tmp_path / "run"
    config = write_config(corpus, tmp_path / "run.yaml", run_dir)
    request = SlurmRequest(nodes=2, gpus_per_node=0, tasks_per_node=2, time="10")
    (job,) = launch_slurm(config, [], request, site, dry_run=False).jobs
    cluster.until(lambda: len(hashes(run_dir)) > 5, "training", run_dir / "log", job)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert cluster.finished(job, run_dir / "log") == "COMPLETED"
    assert verdicts(run_dir) == ["saved", "finished"]
    saved = attempts(run_dir, "end")[0]["checkpoint"]
    assert 5 < saved < STEPS
    assert attempts(run_dir, "start")[1]["checkpoint"] == saved
    assert hashes(run_dir) == uninterrupted


def test_a_bad_node_is_avoided_by_the_next_job(
    cluster, site: Site, corpus: Path, tmp_path: Path, uninterrupted
) -> None:
    """The check fails on one of two nodes, and there is no spare. The first node to ask becomes the broken one."""
    run_dir, mark = tmp_path / "run", tmp_path / "broken"
    broken = f'ln -s "$SLURMD_NODENAME" {mark} 2>/dev/null; [ "$(readlink {mark})" != "$SLURMD_NODENAME" ]'
    config = write_config(corpus, tmp_path / "run.yaml", run_dir)
    site = site.model_copy(update={"preflight": PREFLIGHT.model_copy(update={"commands": [broken]})})
    (job,) = launch_slurm(config, [], SlurmRequest(nodes=2, gpus_per_node=0), site, dry_run=False).jobs
    cluster.until(lambda: attempts(run_dir, "resubmitted"), "the next job", run_dir / "log")
    (again,) = attempts(run_dir, "resubmitted")
    assert (again["instead_of"], cluster.finished(again["job"], run_dir / "log")) == (job, "COMPLETED")
    (bad,) = {note["node"] for note in attempts(run_dir, "bad_node")}
    assert bad == str(mark.readlink())
    (start,) = attempts(run_dir, "start")
    assert bad not in start["nodes"]
    assert len(start["nodes"]) == 2
    assert hashes(run_dir) == uninterrupted


def finishes_without(cluster, nodes: str, job: str, run_dir: Path) -> None:
    """`nodes`, separated by commas, go down while the job runs."""
    cluster.run("scontrol", "update", f"nodename={nodes}", "state=down", "reason=test")
    try:
        assert cluster.finished(job, run_dir / "log") == "COMPLETED"
    finally:
        cluster.run("scontrol", "update", f"nodename={nodes}", "state=resume")


def test_lost_nodes_and_the_run_goes_on_with_fewer(
    cluster, site: Site, corpus: Path, tmp_path: Path, uninterrupted
) -> None:
    """Three of four nodes train, two of them go down: SLURM requeues the job, which has two nodes to go on with."""
    run_dir = tmp_path / "run"
    config = write_config(corpus, tmp_path / "run.yaml", run_dir)
    request = SlurmRequest(nodes=3, min_nodes=2, gpus_per_node=0)
    cluster.idle()
    (job,) = launch_slurm(config, [], request, site, dry_run=False).jobs
    cluster.until(lambda: len(hashes(run_dir)) > 14, "training", run_dir / "log", job)
    nodes = attempts(run_dir, "start")[0]["nodes"]
    assert len(nodes) == 3
    lost = ",".join(nodes[1:])
    finishes_without(cluster, lost, job, run_dir)
    first, second = attempts(run_dir, "start")
    assert not set(second["nodes"]) & set(nodes[1:])
    assert (first["processes"], second["processes"]) == (3, 2)
    assert second["checkpoint"] >= 12
    assert verdicts(run_dir) == ["again", "finished"]
    assert hashes(run_dir) == uninterrupted


def test_a_spare_takes_the_place_of_a_lost_node(
    cluster, site: Site, corpus: Path, tmp_path: Path, uninterrupted
) -> None:
    """In the same job: it is not requeued."""
    run_dir = tmp_path / "run"
    config = write_config(corpus, tmp_path / "run.yaml", run_dir)
    request = SlurmRequest(nodes=2, spares=1, gpus_per_node=0)
    cluster.idle()
    (job,) = launch_slurm(config, [], request, site, dry_run=False).jobs
    cluster.until(lambda: len(hashes(run_dir)) > 14, "training", run_dir / "log", job)
    nodes = attempts(run_dir, "start")[0]["nodes"]
    finishes_without(cluster, nodes[1], job, run_dir)
    first, second = attempts(run_dir, "start")
    assert first["job"] == second["job"] == job
    assert first["nodes"][0] == second["nodes"][0]
    assert nodes[1] not in second["nodes"]
    assert "requeue" not in (run_dir / "log" / f"slurm-{job}.log").read_text()
    assert hashes(run_dir) == uninterrupted


FAILING = """#!/bin/bash
# Stands in for the interpreter: a trainer that gets to a later step at first, then fails at the same one for ever.
attempt=$(grep -c '"start"' "$RUN_DIR/launch/attempts.jsonl")
[ "$RANK" != 0 ] || echo "{\\"step\\": $((attempt < 2 ? 7 : 9)), \\"loss\\": 1.0}" >>"$RUN_DIR/metrics.jsonl"
# The first to fail ends the others, so all wait for the record.
until [ "$(cat "$RUN_DIR/metrics.jsonl" 2>/dev/null | wc -l)" -ge "$attempt" ]; do sleep 0.1; done
echo "rank $RANK fails"
exit 4
"""


def test_it_gives_up_after_failing_at_the_same_step(cluster, corpus: Path, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(FAILING)
    python.chmod(0o755)
    site = Site(sbatch={"mem": 100}, preflight=Preflight(enabled=False), python=str(python))
    site = site.model_copy(update={"batch_python": sys.executable})
    run_dir = tmp_path / "run"
    config = write_config(corpus, tmp_path / "run.yaml", run_dir)
    request = SlurmRequest(nodes=2, gpus_per_node=0, max_failures=9)
    (job,) = launch_slurm(config, [], request, site, dry_run=False).jobs
    assert cluster.finished(job, run_dir / "log") == "FAILED"
    assert verdicts(run_dir) == ["again", "again", "give-up"]
    assert [end["step"] for end in attempts(run_dir, "end")] == [7, 9, 9]
    status = status_of(run_dir)
    assert (status.word, status.exit_code) == ("given up", 4)
    assert "failed 2 times after step 9; giving up" in (run_dir / "log" / f"slurm-{job}.log").read_text()
    assert cluster.run("scontrol", "show", "job", job).count("ExitCode=4:0") == 1


def test_a_sweep_is_an_array_of_runs(cluster, site: Site, corpus: Path, tmp_path: Path, uninterrupted) -> None:
    folder = tmp_path / "sweep"
    config = write_config(corpus, tmp_path / "run.yaml", folder)
    vary = ["optimizer.lr=[1e-3, 3e-3]"]
    (job,) = launch_sweep(config, [], vary, SlurmRequest(nodes=1, gpus_per_node=0), site).jobs
    assert cluster.finished(job, folder / "log") == "COMPLETED"
    runs = sweep_runs(folder)
    assert [settings for _, settings in runs] == [{"optimizer.lr": 1e-3}, {"optimizer.lr": 3e-3}]
    for run, _ in runs:
        assert hashes(run) == uninterrupted  # the learning rate does not shape the data
        assert status_of(run).word == "finished"
    rates = [json.loads((run / "metrics.jsonl").read_text().splitlines()[STEPS // 2])["lr"] for run, _ in runs]
    assert rates[0] < rates[1]
