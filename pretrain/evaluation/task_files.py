"""Where a task's definition and its data are: lm-eval's own YAML files, and JSON lines in a local folder.

    tasks/winogrande/validation.jsonl      one record a line, with the columns of the task's data set
    tasks/lambada_openai/test.jsonl
    tasks/my_task/my_task.yaml             a task of your own, in lm-eval's format, with its data beside it

Nothing is fetched: each task is given to lm-eval as a YAML file that includes the task's and names local data.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from headrace.errors import ConfigError

BUILTIN = Path(__file__).parent / "builtin"
"""Tasks that come with their data."""
FAMILIES = {
    "lambada": "lambada",
    "winogrande": "winogrande",
    "hellaswag": "hellaswag",
    "piqa": "piqa",
    "race": "race",
    "boolq": "super_glue/boolq",
    "belebele": "belebele",
    "xnli": "xnli",
    "xstorycloze": "xstorycloze",
    "xwinograd": "xwinograd",
}
"""Folders among lm-eval's tasks, by what names of tasks in them begin with. Not all of its folders are read: there are
thousands of files, and reading them takes longer than most evaluations here."""
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


@dataclass(frozen=True)
class TaskFiles:
    """One task."""

    name: str
    definition: Path
    """lm-eval's YAML file."""
    splits: dict[str, str | None]
    """The definition's splits by key; None where there is no file, or the task has no such split."""
    data: dict[str, Path]
    """JSON lines by name of split."""

    def overlay(self, cache: Path) -> str:
        """The definition with this data, as YAML."""
        files = {split: str(path.resolve()) for split, path in self.data.items()}
        return yaml.safe_dump(
            {
                "include": str(self.definition.resolve()),
                "task": self.name,
                "dataset_path": "json",
                "dataset_name": None,
                "dataset_kwargs": {"data_files": files, "cache_dir": str(cache)},
                **self.splits,
            },
            allow_unicode=True,
        )


@dataclass
class Found:
    """Tasks to run, and the groups whose means were asked for."""

    tasks: dict[str, TaskFiles] = field(default_factory=dict)
    groups: dict[str, list[str]] = field(default_factory=dict)
    """Members of each group, by its name."""


def find_tasks(names: Sequence[str], folder: Path | None, shots: int | None) -> Found:
    """The tasks that `names` stand for, groups resolved. Raises ConfigError for an unknown one, and for missing data.

    `folder` holds the data of tasks that are not built in; `shots` is how many solved examples a question gets, None
    for what the task says.
    """
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--task-data {folder}: no such folder")
    index = _index(names, folder)
    found = Found()
    for name in dict.fromkeys(names):
        if name not in index:
            known = sorted({*_index([*FAMILIES], folder), *FAMILIES})
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
            hint = f"did you mean {', '.join(near)}?" if near else f"there are: {', '.join(sorted(FAMILIES))}"
            raise ConfigError(f"--tasks: no task {name!r}; {hint} (headrace_tiny is built in)")
        members = _members(index, name)
        if members != [name]:
            found.groups[name] = members
        _check_data(members, name, index, folder)
        for member in members:
            found.tasks[member] = _task(index[member], folder, shots)
    return found


def _index(names: Sequence[str], folder: Path | None) -> dict[str, Any]:
    """lm-eval's entries of the folders that can hold `names`."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    paths = [root / path for begin, path in FAMILIES.items() if any(name.startswith(begin) for name in names)]
    own = [] if folder is None else [folder]
    manager = lm_eval.tasks.TaskManager(include_path=[str(p) for p in [BUILTIN, *paths, *own]], include_defaults=False)
    index: dict[str, Any] = manager.task_index
    return index


def _members(index: dict[str, Any], name: str) -> list[str]:
    """The tasks behind `name`, itself if it is one; in a fixed order."""
    entry = index[name]
    if entry.kind.name in ("TASK", "PY_TASK"):
        return [name]
    parts = sorted(entry.tags) if entry.kind.name == "TAG" else (entry.cfg or {}).get("task") or []
    if not all(isinstance(part, str) and part in index for part in parts):
        raise ConfigError(f"--tasks: {name} is a group with definitions inside it; name its tasks one by one")
    return list(dict.fromkeys(member for part in parts for member in _members(index, part)))


def _place(entry: Any, folder: Path | None) -> Path | None:
    """Where a task's data belong."""
    return BUILTIN / entry.name if BUILTIN in entry.yaml_path.parents else folder and folder / entry.name


def _evaluated_split(entry: Any) -> str:
    return str(entry.cfg.get("test_split") or entry.cfg.get("validation_split") or "test")


def _check_data(members: Sequence[str], name: str, index: dict[str, Any], folder: Path | None) -> None:
    missing = []
    for member in members:
        entry = index[member]
        if entry.kind.name == "PY_TASK":
            raise ConfigError(f"--tasks: {member} is a Python class, which brings its own data; it cannot run offline")
        place, file = _place(entry, folder), f"{_evaluated_split(entry)}.jsonl"
        if place is None:
            raise ConfigError(f"--tasks: {member} needs its data: --task-data DIR with DIR/{member}/{file}")
        if not (place / file).is_file():
            missing.append(place / file)
    if missing:
        first = f"--task-data: no {missing[0]}: the records of {missing[0].parent.name}, one JSON object a line"
        more = f"; {len(missing)} of the {len(members)} tasks of {name} lack theirs: name those you have"
        raise ConfigError(first + (more if len(members) > 1 else ""))


def _task(entry: Any, folder: Path | None, shots: int | None) -> TaskFiles:
    place = _place(entry, folder)
    assert place is not None
    data: dict[str, Path] = {}
    splits: dict[str, str | None] = {}
    for key in _SPLITS:
        split = entry.cfg.get(key)
        file = place / f"{split}.jsonl"
        there = isinstance(split, str) and file.is_file()
        splits[key] = split if there else None
        if there:
            data[split] = file
    wanted = entry.cfg.get("num_fewshot") or 0 if shots is None else shots
    source = entry.cfg.get("fewshot_split") or entry.cfg.get("training_split")
    if wanted and source and source not in data:
        raise ConfigError(f"--task-data: no {place / f'{source}.jsonl'}: the solved examples of {entry.name}")
    return TaskFiles(entry.name, entry.yaml_path, splits, data)
