"""The benchmark of `metrics.dynamics` still runs, and says what every part of a measured step takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def test_cost_is_told_by_parts(tmp_path: Path) -> None:
    out = tmp_path / "cost.json"
    small = ["--quick", "--pairs", "2", "--hidden-size", "128", "--layers", "2", "--out", str(out)]
    command = [sys.executable, str(ROOT / "benchmarks" / "dynamics_cost.py"), *small]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [shape] = json.loads(out.read_text())["shapes"].values()
    assert shape["every_10"] == pytest.approx(1 + (shape["measured"]["median"] - 1) / 10, abs=1e-4)
    assert set(shape["parts_of_a_step"]) == {
        "attention logits",
        "query, key and block norms",
        "output logits",
        "micro-batch gradients",
        "weights and gradients",
        "totals",
    }
