"""What checkpoints cost a run, and how long a run takes to come back.

    python benchmarks/recovery.py --work DIR

stall       how long a save holds up training: written behind the run's back, beside written at once, in turn
speed       tokens per second with a save every 20 steps, beside none, in turn
time back   from the SIGKILL of a run under `headrace launch local` to its first new step, in parts:
            noticed (by the launcher), pause (its back-off), import (Python, torch, megatron), resumed (process groups,
            model, checkpoint, data), step; once early and once after twenty times as many steps, to see that what was
            consumed does not matter
"""

import argparse
import itertools
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from loading.result import circumstances, result_options, versions, write_result

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "recovery.json"
PAIRS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result_options(parser, RESULT)
    parser.add_argument("--work", type=Path, required=True, help="folder with `data/` as `make quickstart` makes it")
    words = parser.parse_args()
    result = {
        **circumstances("recovery.py"),
        "versions": versions(["torch", "megatron-core"]),
        "saves": saves(words.work),
        "time_back": [time_back(words.work, steps) for steps in (20, 400)],
    }
    write_result(words.out, result)


def saves(work: Path) -> dict[str, Any]:
    """Speeds of runs with and without saves, taking turns."""
    arms = {"none": ["checkpoint.every=0"], "behind": ["checkpoint.every=20"],
            "at once": ["checkpoint.every=20", "checkpoint.behind=false"]}  # fmt: skip
    found: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    for turn in range(PAIRS):
        for name in list(arms) if turn % 2 == 0 else list(arms)[::-1]:
            found[name].append(speed(work, arms[name]))
    speeds = {name: [each["tokens_per_s"] for each in every] for name, every in found.items()}
    stalls = {name: [each["stall_s"] for each in every] for name, every in found.items() if name != "none"}
    middle = {name: statistics.median(each) for name, each in stalls.items()}
    return {
        "tokens_per_s": speeds,
        "behind_over_none": median_ratio(speeds["behind"], speeds["none"]),
        "at_once_over_none": median_ratio(speeds["at once"], speeds["none"]),
        "stall_s": stalls,
        "stall_behind_over_at_once": round(middle["behind"] / middle["at once"], 3),
    }


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 3)


def speed(work: Path, overrides: list[str]) -> dict[str, float]:
    """Tokens per second from step 20 to 120 by the clock, saves included, and the longest gap that a save made."""
    run = work / "run"
    shutil.rmtree(run, ignore_errors=True)
    config = str(ROOT / "recipes" / "quickstart.yaml")
    overrides = [f"run.dir={run}", "train.steps=121", "train.eval_every=0", "metrics.progress=false", *overrides]
    command = [sys.executable, "-m", "pretrain", "train", config, *overrides]
    process = subprocess.Popen(command, cwd=work, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    times: list[float] = []
    metrics = run / "metrics.jsonl"
    while process.poll() is None:
        lines = metrics.read_bytes().count(b'"loss"') if metrics.exists() else 0
        times += [time.perf_counter()] * (lines - len(times))
        time.sleep(0.002)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    gaps = [b - a for a, b in itertools.pairwise(times)]
    usual = statistics.median(gaps[20:120])
    # A save after step k is in the gap before record k: k = 40, 60, 80, 100 (the first one is left out).
    held_up = [gaps[step - 1] - usual for step in (40, 60, 80, 100)]
    tokens = 100 * 4096
    return {
        "tokens_per_s": round(tokens / (times[120] - times[20]), 1),
        "stall_s": round(statistics.median(held_up), 4),
    }


def time_back(work: Path, steps: int) -> dict[str, float]:
    """Seconds of the parts of a restart, the run being killed after `steps` steps."""
    run = work / "run"
    shutil.rmtree(run, ignore_errors=True)
    config = str(ROOT / "recipes" / "quickstart.yaml")
    overrides = [
        f"run.dir={run}",
        "train.steps=1000",
        "checkpoint.every=10",
        "train.eval_every=0",
        "train.eval_sequences=0",
    ]
    command = [str(Path(sys.executable).with_name("headrace")), "launch", "local", config, "--nproc", "1", *overrides]
    process = subprocess.Popen(command, cwd=work, stderr=subprocess.PIPE, text=True, start_new_session=True)
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b'"loss"') < steps:
        time.sleep(0.005)
    (child,) = (int(pid) for pid in subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split())
    subprocess.run(["kill", "-9", str(child)], check=True)
    at = {"killed": time.perf_counter()}
    assert process.stderr is not None
    for line in process.stderr:
        if "restart 1" in line:
            at["noticed"] = time.perf_counter()
            at["pause"] = at["noticed"] + 1.0
        if line.startswith("resuming"):
            at["resumed"] = time.perf_counter()
        if line.startswith("step") and "resumed" in at:  # the first step's line
            at["step"] = time.perf_counter()
            break
    process.terminate()
    process.wait()
    importing = importing_s()
    return {
        "steps_before": steps,
        "noticed_s": round(at["noticed"] - at["killed"], 2),
        "pause_s": 1.0,
        "import_s": round(importing, 2),
        "resumed_s": round(at["resumed"] - at["pause"] - importing, 2),
        "step_s": round(at["step"] - at["resumed"], 2),
        "in_all_s": round(at["step"] - at["killed"], 2),
    }


def importing_s() -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import pretrain.train"], cwd=ROOT, check=True)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
