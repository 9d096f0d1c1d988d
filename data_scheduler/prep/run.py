"""Carries out a preparation: checks, passes on an executor, resuming.

    outcome = prepare(load_prep_config("prep.yaml"))
    outcome.report["documents"]

The folder remembers what it was made from (`prep.json`); going on with anything else is refused, because finished
tasks would not be of the same kind as new ones.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_scheduler.paths import expand, file_kind
from data_scheduler.prep.config import LanguageStep, LocalExecutor, PrepConfig, TokensStep
from headrace.errors import ConfigError, DataError

STATE = "prep.json"


@dataclass(frozen=True)
class Outcome:
    """How a call of `prepare` ended."""

    report: dict[str, Any] | None
    """The report; None when jobs were submitted that will write it."""
    was_done: bool = False
    """Whether there was nothing left to do."""


def prepare(config: PrepConfig) -> Outcome:
    """Carry out a preparation, or go on with one that stopped.

    Raises ConfigError for what the user can mend (paths, models, packages, a folder that belongs to another
    preparation) and DataError when a task fails.
    """
    try:
        import datatrove  # noqa: F401
    except ImportError:
        raise ConfigError("preparing data needs datatrove: pip install 'headrace[prep]'") from None
    files = expand(config.input.paths, "input.paths")
    for path, _ in files:
        kind, _ = file_kind(path, config.input.format)
        if kind not in ("jsonl", "parquet", "text"):
            raise ConfigError(f"input.paths: {path}: {kind} files are not prepared; jsonl, parquet and text are")
    state = _state(config, files)
    from data_scheduler.prep.plan import make_passes
    from data_scheduler.prep.tally import REPORT

    out = Path(config.out)
    _claim(out, state)
    if (out / REPORT).exists():
        report = json.loads((out / REPORT).read_text(encoding="utf-8"))
        _check_output(out, report)
        return Outcome(report, was_done=True)
    passes = make_passes(config, [path for path, _ in files])
    if isinstance(config.executor, LocalExecutor):
        from data_scheduler.prep.local import run_passes

        run_passes(passes, config.executor)
        return Outcome(json.loads((out / REPORT).read_text(encoding="utf-8")))
    from data_scheduler.prep.slurm import submit_passes

    submit_passes(passes, config.executor)
    return Outcome(None)


def _state(config: PrepConfig, files: list[tuple[str, int]]) -> dict[str, Any]:
    """All that decides the output's bytes. Raises ConfigError when a tokenizer or model cannot be used."""
    made_by: dict[str, Any] = {}
    for number, step in enumerate(config.steps):
        if isinstance(step, TokensStep):
            from data_scheduler.encoder import load_encoder

            made_by[step.tokenizer] = load_encoder(step.tokenizer).fingerprint
        if isinstance(step, LanguageStep):
            from data_scheduler.prep.language import check_model

            check_model(step.model, f"steps.{number}.model")
            made_by[step.model] = os.path.getsize(step.model)
    settings = config.model_dump(mode="json", exclude={"executor", "out"})
    return {"config": settings, "files": dict(files), "models": made_by}


def _claim(out: Path, state: dict[str, Any]) -> None:
    """Make the folder this preparation's. Raises ConfigError when it is another's."""
    path = out / STATE
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        for part, what in (("config", "configuration"), ("files", "input files"), ("models", "tokenizers or models")):
            if before[part] != state[part]:
                where = ".".join(_difference(before[part], state[part]))
                raise ConfigError(
                    f"out: {out} was begun with other {what} ({where} differs); choose another folder, or delete it"
                )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out: {out} holds something else; choose a folder that is new or empty")
    out.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(state, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(temporary, path)


def _difference(before: Any, now: Any) -> list[str]:
    """The path of the first value that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *now]:
            if key not in before or key not in now or before[key] != now[key]:
                return [str(key), *_difference(before.get(key), now.get(key))]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for number, (left, right) in enumerate(zip(before, now, strict=True)):
            if left != right:
                return [str(number), *_difference(left, right)]
    return []


def _check_output(out: Path, report: dict[str, Any]) -> None:
    for name, size in report["files"].items():
        path = out / name
        if not path.is_file() or path.stat().st_size != size:
            raise DataError(f"{path} is not what was written; delete {out} to prepare the data again")
