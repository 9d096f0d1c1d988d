"""Runs tasks on a model: lm-eval asks, `LanguageModel` answers, and what lm-eval found is put in order.

outcome = score(load(Path("runs/quickstart")), ["headrace_tiny"], None)
outcome.tasks["headrace_choice"].scores["acc"].value
"""

import io
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headrace.errors import ConfigError
from pretrain.convert.loaded import Loaded

BOOTSTRAP = 1000
"""Resamplings for standard errors of metrics that are no means (lambada's perplexity)."""


@dataclass(frozen=True)
class Score:
    """One metric of a task or group."""

    value: float
    standard_error: float | None
    """None where lm-eval has no estimate."""
    higher_is_better: bool | None


@dataclass(frozen=True)
class TaskScores:
    """What came out of a task, or the mean over a group's tasks."""

    scores: dict[str, Score]
    """By metric: `acc`, `acc_norm`, …; of another filter than `none` as `exact_match@strict`."""
    items: int
    """Questions asked."""
    of_items: int
    """Questions there are."""
    shots: int | None = None
    """Solved examples before each question; None for a group."""
    version: str | None = None
    """The task's, from its definition; None for a group."""
    members: list[str] = field(default_factory=list)
    """The tasks of a group, each of which counts alike in its mean."""


@dataclass(frozen=True)
class Outcome:
    """What tasks said of a model."""

    tasks: dict[str, TaskScores]
    groups: dict[str, TaskScores]
    cut: int
    """Requests that were longer than the model's longest sequence; their beginning was left out."""

    def values(self) -> dict[str, float]:
        """`task/metric` → value, as they stand in `metrics.jsonl`."""
        both = {**self.tasks, **self.groups}
        return {f"{name}/{metric}": s.value for name, found in both.items() for metric, s in found.scores.items()}


def score(
    loaded: Loaded,
    names: Sequence[str],
    data: Path | None,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 16,
) -> Outcome:
    """Run the tasks `names` with the data in the folder `data`, `limit` questions of each at most.

    Raises ConfigError for what the user can mend: an unknown task, missing or unsuitable data, lm-eval not installed.
    """
    lm_eval = import_lm_eval()
    from pretrain.evaluation.language_model import LanguageModel
    from pretrain.evaluation.task_files import find_tasks

    found = find_tasks(names, data, shots)
    model = LanguageModel(loaded, batch_size)
    with tempfile.TemporaryDirectory(prefix="headrace-eval-") as scratch, _quiet():
        definitions = Path(scratch) / "tasks"
        definitions.mkdir()
        for name, task in found.tasks.items():
            (definitions / f"{name}.yaml").write_text(task.overlay(Path(scratch) / "cache"), "utf-8")
        manager = lm_eval.tasks.TaskManager(include_path=str(definitions), include_defaults=False)
        tasks = [_load(manager, name, data) for name in found.tasks]
        raw = lm_eval.simple_evaluate(
            model=model,
            tasks=tasks,
            task_manager=manager,
            num_fewshot=shots,
            limit=limit,
            bootstrap_iters=BOOTSTRAP,
            log_samples=False,
        )
    scored = {name: _of_task(name, raw) for name in found.tasks}
    groups = {name: _mean(members, scored) for name, members in found.groups.items()}
    return Outcome(scored, {name: mean for name, mean in groups.items() if mean.scores}, model.cut)


def import_lm_eval() -> Any:
    """The library, told to stay offline and quiet. Raises ConfigError when it is not installed."""
    # Read when `datasets` is imported: without them it asks its hub about every local file, and waits for an answer.
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "HF_EVALUATE_OFFLINE"):
        os.environ.setdefault(name, "1")
    try:
        import datasets
        import lm_eval
        import lm_eval.tasks
    except ImportError as error:
        raise ConfigError(f"tasks need the library lm-eval ({error}); `pip install 'headrace[eval]'`") from None
    datasets.disable_progress_bars()
    for logger in ("lm_eval", "datasets"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    return lm_eval


@contextmanager
def _quiet() -> Iterator[None]:
    """Standard output belongs to the caller's table or JSON; progress bars are shown to people only."""
    bars = sys.stderr if sys.stderr.isatty() else io.StringIO()
    with redirect_stdout(bars), redirect_stderr(bars):
        yield


def _load(manager: Any, name: str, data: Path | None) -> Any:
    """lm-eval's task; its data are read here, and its first question is asked for."""
    try:
        return manager.load([name])["tasks"][name]
    except Exception as error:  # whatever a definition's functions make of data that are not theirs
        text = str(error.__cause__ or error).strip().partition("\n")[0]
        where = "" if data is None else f" in {data / name}"
        raise ConfigError(f"{name}: the data{where} do not fit the task: {type(error).__name__}: {text}") from None


def _of_task(name: str, raw: Mapping[str, Any]) -> TaskScores:
    found = raw["results"][name]
    better = raw.get("higher_is_better", {}).get(name, {})
    scores = {}
    for key, value in found.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        error = found.get(f"{metric}_stderr,{kind}")
        label = metric if kind == "none" else f"{metric}@{kind}"
        scores[label] = Score(float(value), error if isinstance(error, float) else None, better.get(metric))
    counts = raw["n-samples"][name]
    version = raw.get("versions", {}).get(name)
    return TaskScores(
        scores=scores,
        items=int(counts["effective"]),
        of_items=int(counts["original"]),
        shots=int(raw["n-shot"][name]),
        version=None if version is None else str(version),
    )


def _mean(members: Sequence[str], scored: Mapping[str, TaskScores]) -> TaskScores:
    """The plain mean of every metric that all members have; its error as of independent samples."""
    parts = [scored[member] for member in members]
    scores = {}
    for metric, first in parts[0].scores.items():
        if any(metric not in part.scores for part in parts):
            continue
        own = [part.scores[metric] for part in parts]
        errors = [one.standard_error for one in own]
        known = [error for error in errors if error is not None]
        error = sum(e * e for e in known) ** 0.5 / len(own) if len(known) == len(own) else None
        scores[metric] = Score(sum(one.value for one in own) / len(own), error, first.higher_is_better)
    items, of_items = sum(part.items for part in parts), sum(part.of_items for part in parts)
    return TaskScores(scores, items, of_items, members=list(members))
