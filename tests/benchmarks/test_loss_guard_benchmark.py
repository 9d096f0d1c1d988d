"""The loss guard's benchmark counts what its runs' journals say, and what is done to a run is what it says."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def benchmark_module() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))  # as when it runs as a script
    try:
        spec = importlib.util.spec_from_file_location("loss_guard_benchmark", ROOT / "benchmarks" / "loss_guard.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_journals_are_counted(benchmark_module: ModuleType) -> None:
    judged, tokens = benchmark_module.judged, benchmark_module.TOKENS
    first = {"anomaly": 90, "to": 80, "attempt": 1, "passed_over": None, "cause": "unknown"}
    second = {"anomaly": 90, "to": 80, "attempt": 2, "passed_over": [89, 90], "cause": "data or optimisation"}
    hardware = {"anomaly": 90, "cause": "not reproduced: hardware, most likely", "action": "none"}
    other = {"anomaly": 40, "to": 40, "attempt": 1, "passed_over": None, "cause": "unknown"}
    runs = [
        judged("poisoned documents", 90, 160, 0, [first, second]),
        judged("flipped bit", 89, 160, 0, [first, hardware]),
        judged("bad learning rate", 100, 160, 0, []),
        judged("clean", None, 160, 0, [other]),
    ]
    assert [run["tokens_lost"] for run in runs] == [24 * tokens, 11 * tokens, 0, tokens]
    found = benchmark_module.summary(runs)
    assert (found["precision"], found["recall"]) == (pytest.approx(2 / 3, abs=1e-4), pytest.approx(2 / 3, abs=1e-4))
    assert (found["attribution"], found["false_alarms"], found["steps_judged"]) == (1.0, 1, 640)


def test_poisoned_documents_are_found_and_their_cause_named(benchmark_module: ModuleType, tmp_path: Path) -> None:
    benchmark_module.make_corpus(tmp_path / "corpus")
    run = benchmark_module.one_run("poisoned documents", 0, 70, tmp_path)
    log = tmp_path / "poisoned-documents-0.log"
    assert run["exit_code"] == 0, log.read_text()
    assert run["found"], log.read_text()
    assert run["cause"] == "data or optimisation"
    assert run["false_alarms"] == 0
