"""The data benchmarks still run, on little, and check what they say they check."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from benchmarks.loading import corpus
from data_scheduler.policies import BUILT_IN

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the corpus of 2 MB is kept."""
    return tmp_path_factory.mktemp("benchmarks")


def run(script: str, *words: str) -> str:
    """What a benchmark prints."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_bare_machine_still_has_eight_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's slim images carry no manuals, no headers and hardly a script; Python's own modules are always there."""
    standard = Path(sysconfig.get_path("stdlib"))
    modules = [path for path in sorted(standard.glob("*.py")) if path.is_file()]
    nothing = {suffixes: [] for _, _, suffixes in corpus.KINDS if suffixes}
    monkeypatch.setattr(corpus, "_candidates", lambda: {**nothing, corpus.KINDS[6][2]: modules})
    facts = corpus.build(tmp_path / "corpus", 1, lambda line: None)
    assert all(kind["documents"] > 0 and kind["tokens"] > 0 for kind in facts["kinds"].values())
    for split in ("main", "warm"):
        for suffix in ("jsonl", "jsonl.zst", "parquet"):
            found = corpus.files(tmp_path / "corpus", split, 8, suffix)
            assert all(found.values()), found
            assert len(found) == 8


def test_throughput_measures_hashes_and_draws(work: Path) -> None:
    out = work / "throughput.json"
    quick = ("--quick", "--peers", "none", "--work", str(work), "--out", str(out))
    shown = run("data_throughput.py", *quick, "--repeats", "1")
    result: dict[str, Any] = json.loads(out.read_text())
    arms = {arm["key"]: arm for arm in result["arms"]}
    ours = arms["ours_zst/8"]
    assert ours["tokens"] >= result["corpus"]["tokens"] * 9 // 10
    assert 0 < ours["mtok_per_cpu_s"]["min"] <= ours["mtok_per_cpu_s"]["median"] <= ours["mtok_per_cpu_s"]["max"]
    profile = arms["profile/8"]
    assert profile["sha256"] == ours["sha256"]  # the stopwatches and the missing loader thread change nothing
    assert not profile["phases_not_found"], "the engine's parts moved; correct PHASES in benchmarks/loading/ours.py"
    assert profile["phases_cpu_s"]["encode"] > 0
    assert "Headrace, .jsonl.zst" in shown
    run("data_throughput.py", "--plot", str(out), "--picture", str(work / "speed.png"))
    assert (work / "speed.png").stat().st_size > 10_000


def test_soak_compares_resumed_batches(work: Path) -> None:
    out = work / "soak.json"
    short = ("--minutes", "0.02", "--stops", "960", "--repeats", "1")
    run("data_soak.py", "--mb", "2", "--work", str(work), "--out", str(out), *short)
    result = json.loads(out.read_text())
    assert [one["sequences"] for one in result["resume"]] == [960]
    assert all(one["same_batches"] for one in result["resume"])
    assert result["memory"]["points"][-1]["sequences"] == result["memory"]["sequences"] > 0


def test_policies_are_measured(tmp_path: Path) -> None:
    out = tmp_path / "overhead.json"
    shown = run("policy_overhead.py", "--steps", "30", "--out", str(out))
    result = json.loads(out.read_text())
    assert result["latency_steps"] == {"odm": result["horizon"]}
    for sources in result["sources"].values():
        assert set(sources["policies"]) == set(BUILT_IN)
        assert all(policy["decision_us"] <= policy["dearest_us"] for policy in sources["policies"].values())
    assert "of a data step" in shown


def test_bands_are_measured(tmp_path: Path) -> None:
    out = tmp_path / "bands.json"
    run("data_bands.py", "--megabytes", "1", "--repeats", "1", "--out", str(out))
    rows = json.loads(out.read_text())["rows"]
    assert {(row["format"], row["bands"]) for row in rows if row["of_one"] == 1.0} >= {(".jsonl", 1), (".parquet", 1)}
    assert all(row["tokens_per_cpu_s"] > 0 and row["cached_tokens_per_cpu_s"] > 0 for row in rows)


def test_scale_plans_and_deals(tmp_path: Path) -> None:
    out = tmp_path / "scale.json"
    small = ("--ranks", "8", "--lanes", "48", "--sources", "5", "--files", "2000", "--batches", "16", "--steps", "20")
    run("data_scale.py", *small, "--out", str(out))
    result = json.loads(out.read_text())
    assert result["index"]["files"] == 2000
    assert result["planning"][0]["worst_sequences_off_the_mixture"] < 1.001
    run("data_scale.py", "--plot", str(out), "--picture", str(tmp_path / "scale.png"))
    assert (tmp_path / "scale.png").exists()
