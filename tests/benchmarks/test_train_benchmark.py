"""The training benchmark still runs, on little, and checks that its arms train the same model."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import train_throughput

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def run(out: Path, *words: str) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "benchmarks" / "train_throughput.py"), "--quick", "--out", str(out), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def test_arms_take_turns_and_train_the_same_model(tmp_path: Path) -> None:
    result = run(tmp_path / "result.json", "--rounds", "2", "--steps", "1")
    cpu = result["cpu"]
    assert set(cpu["arms"]) == set(train_throughput.ARMS)
    first = cpu["first_losses"]
    assert first["plain"] == pytest.approx(first["ours"], rel=1e-5)
    assert first["hf"] == pytest.approx(first["ours"], rel=1e-5)
    assert first["hf_whole_rows"] != pytest.approx(first["ours"], rel=1e-5)  # it sees across documents
    assert cpu["ours_over"]["plain"]["cpu"]["min"] > 0
    assert cpu["scaling"]["speedup"] > 0
    assert result["gpu"] == "not measured: no GPU was at hand"
    # What the GPU part trains, on whatever device there is; the CPU's figures stay.
    rows = run(tmp_path / "result.json", "--device", "gpu")
    assert rows["cpu"] == cpu
    assert [row["arm"] for row in rows["gpu"]] == ["ours", "megatron"]
    assert all(row["tokens_per_s"] > 0 and row["losses"][-1] > 0 for row in rows["gpu"]), rows["gpu"]
    for row in rows["gpu"]:
        assert row["mfu_full"] > row["mfu_causal"] > 0


def test_another_model_is_refused() -> None:
    same = [5.0, 4.9]
    train_throughput.check_losses({"ours": same, "plain": [5.0, 4.9001], "hf": same, "hf_whole_rows": [9.0, 9.0]})
    with pytest.raises(SystemExit, match=r"step 1: loss 4\.9 here and 4\.91 in plain: not the same model"):
        train_throughput.check_losses({"ours": same, "plain": [5.0, 4.91]})
