"""Runs on a real SLURM cluster, interrupted in every way, train on the tokens of the uninterrupted run."""

import sys
from pathlib import Path

import pytest
from small_run import STEPS, attempts, hashes, train_here, verdicts, write_config
from warm_python import Server

from launch.request import SlurmRequest
from launch.site import Preflight, Site
from launch.slurm import launch_slurm

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
def uninterrupted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, str]]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    train_here(write_config(corpus, folder / "run.yaml", folder / "run"))
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
    cluster.until(lambda: len(hashes(run_dir)) > 5, "training", run_dir / "log")
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert cluster.finished(job, run_dir / "log") == "COMPLETED"
    assert verdicts(run_dir) == ["saved", "finished"]
    saved = attempts(run_dir, "end")[0]["checkpoint"]
    assert 5 < saved < STEPS
    assert attempts(run_dir, "start")[1]["checkpoint"] == saved
    assert hashes(run_dir) == uninterrupted
