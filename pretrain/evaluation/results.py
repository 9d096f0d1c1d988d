"""Where scores of tasks go: `<run>/evaluations/` with everything, and a line in `metrics.jsonl` with the values."""

import json
import os
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from headrace.version import __version__
from pretrain.evaluation.score import Outcome
from pretrain.metrics.jsonl import append_record


def report(outcome: Outcome, model: str, step: int | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """Everything about an evaluation, as plain JSON."""
    libraries = {name: version(name) for name in ("lm_eval", "torch", "transformers")}
    return {
        "model": model,
        "step": step,
        "arguments": arguments,
        "versions": {"headrace": __version__, **libraries},
        **asdict(outcome),
    }


def write_report(content: dict[str, Any], path: Path) -> None:
    """Write a report into the file `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def record(outcome: Outcome, run: Path, step: int, content: dict[str, Any]) -> Path:
    """Keep an evaluation of the checkpoint of `step` in the run's folder; the path of its report.

    Safe while the run trains on: a report never replaces another, and the record is one write at the file's end.
    """
    folder = run / "evaluations"
    folder.mkdir(exist_ok=True)
    number = 1
    while True:
        path = folder / f"step-{step}-{number}.json"
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            break
        except FileExistsError:
            number += 1
    write_report(content, path)
    append_record(run / "metrics.jsonl", {"step": step, "eval": outcome.values()})
    return path
