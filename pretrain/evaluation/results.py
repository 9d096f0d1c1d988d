"""Where scores of tasks go: `<run>/evaluations/` with everything, and a line in `metrics.jsonl` with the values."""

import json
import os
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from headrace.errors import ConfigError
from headrace.version import __version__
from pretrain.evaluation.score import Outcome
from pretrain.metrics.jsonl import append_record, plain


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


def as_json(content: dict[str, Any]) -> str:
    """A report as text; numbers that are none are the strings of `metrics.jsonl`: "NaN", "Infinity", "-Infinity"."""
    return json.dumps(plain(content), indent=2, ensure_ascii=False, allow_nan=False)


def write_report(content: dict[str, Any], path: Path) -> None:
    """Write a report into the file `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_json(content) + "\n", "utf-8")


def check_writable(run: Path | None, out: Path | None) -> None:
    """Before hours are spent: raise ConfigError unless `record` can write into `run`, and `write_report` to `out`.

    Nothing is left where something is tried.
    """
    if out is not None:
        _try_file(out, f"--out {out}")
    if run is not None:
        _try_file(run / "evaluations" / "new", f"{run / 'evaluations'}")
        _try_file(run / "metrics.jsonl", f"{run / 'metrics.jsonl'}")


def _try_file(path: Path, name: str) -> None:
    try:
        if path.exists():
            path.open("ab").close()
            return
        there = next(folder for folder in path.absolute().parents if folder.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ConfigError(f"{name}: cannot be written: {error.strerror}") from None


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
