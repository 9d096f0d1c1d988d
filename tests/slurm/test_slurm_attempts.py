"""Giving up and sweeps on a real SLURM cluster."""

import json
import sys
from pathlib import Path

import pytest
from small_run import STEPS, attempts, hashes, verdicts, write_config
from warm_python import Server

from launch.jobs import status_of, sweep_runs
from launch.request import SlurmRequest
from launch.site import Preflight, Site
from launch.slurm import launch_slurm
from launch.sweep import launch_sweep

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

FAILING = """#!/bin/bash
# Stands in for the interpreter: a trainer that gets to a later step at first, then fails at the same one for ever.
attempt=$(grep -c '"start"' "$RUN_DIR/launch/attempts.jsonl")
[ "$RANK" != 0 ] || echo "{\\"step\\": $((attempt < 2 ? 7 : 9)), \\"loss\\": 1.0}" >>"$RUN_DIR/metrics.jsonl"
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


def test_a_sweep_is_an_array_of_runs(cluster, warm: Server, corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    config = write_config(corpus, tmp_path / "run.yaml", folder)
    site = Site(sbatch={"mem": 100}, preflight=Preflight(min_free_gb=0.001, max_clock_skew_s=120))
    own = {"python": warm.python, "batch_python": sys.executable, "environment": warm.environment}
    site = site.model_copy(update=own)
    vary = ["optimizer.lr=[1e-3, 3e-3]"]
    request = SlurmRequest(nodes=1, gpus_per_node=0)
    (job,) = launch_sweep(config, [], vary, request, site).jobs
    assert cluster.finished(job, folder / "log") == "COMPLETED"
    runs = sweep_runs(folder)
    assert [settings for _, settings in runs] == [{"optimizer.lr": 1e-3}, {"optimizer.lr": 3e-3}]
    first, second = (hashes(run) for run, _ in runs)
    assert first == second  # the learning rate does not shape the data
    assert len(first) == STEPS
    rates = [json.loads((run / "metrics.jsonl").read_text().splitlines()[STEPS // 2])["lr"] for run, _ in runs]
    assert rates[0] < rates[1]
    assert [status_of(run).word for run, _ in runs] == ["finished", "finished"]
