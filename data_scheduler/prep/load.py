"""From a YAML file to a `PrepConfig`, with errors that name line, key and the nearest valid name."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from data_scheduler.prep.config import PrepConfig
from headrace.errors import ConfigError

Location = tuple[str | int, ...]


def load_prep_config(path: str | Path) -> PrepConfig:
    """The validated configuration. Raises ConfigError: `prep.yaml:12: unknown key steps.0.langs (did you mean …)`."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        raw = yaml.safe_load(text)
        root = yaml.compose(text, yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected the keys {', '.join(PrepConfig.model_fields)}")
    try:
        return PrepConfig.model_validate(raw)
    except ValidationError as error:
        problem = error.errors()[0]
        location, step = _without_tags(problem["loc"], raw)
        line = _line(root, location)
        raise ConfigError(f"{path}:{line}: {_describe(problem, location, step)}") from None


def _without_tags(location: Location, raw: Any) -> tuple[Location, str | None]:
    """The place in the file: pydantic puts the kind of a step into the path; and that kind."""
    parts: list[str | int] = []
    kind = None
    node = raw
    for at, part in enumerate(location):
        if isinstance(node, dict) and part == node.get("kind") and (at == 2 or location[0] == "executor"):
            kind = str(part)
            continue
        parts.append(part)
        try:
            node = node[part]
        except (KeyError, IndexError, TypeError):
            node = None
    return tuple(parts), kind


def _line(root: yaml.Node | None, location: Location) -> int:
    """The line (from 1) of the deepest node on the way to `location`."""
    node, line = root, 1
    for part in location:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == str(part):
                    node, line = value, key.start_mark.line + 1
                    break
            else:
                break
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return line


def _describe(problem: Any, location: Location, kind: str | None) -> str:
    key = ".".join(map(str, location)) or "the file"
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key}" + _nearest(str(location[-1]), _valid_keys(location, kind))
    if problem["type"] == "missing":
        return f"{key} is required"
    if problem["type"] == "union_tag_invalid":
        known = [name.strip(" '") for name in problem["ctx"]["expected_tags"].split(",")]
        return f"{key}: no kind {problem['ctx']['tag']!r}" + _nearest(problem["ctx"]["tag"], known)
    if problem["type"] == "union_tag_not_found":
        return f"{key}.kind is required"
    message = problem["msg"].removeprefix("Value error, ")
    value = problem.get("input")
    shown = f", got {value!r}" if isinstance(value, str | int | float | bool) else ""
    message = message[0].lower() + message[1:] + shown
    return message if not location else f"{key}: {message}"


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else f" (known: {', '.join(known)})"


def _valid_keys(location: Location, kind: str | None) -> list[str]:
    """Field names of the section that holds the key at `location`."""
    model: type[BaseModel] = PrepConfig
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        models = _models_of(model.model_fields[part].annotation)
        chosen = [inner for inner in models if kind in get_args(inner.model_fields.get("kind", _NO_KIND).annotation)]
        model = (chosen or models)[0]
    return list(model.model_fields)


_NO_KIND = PrepConfig.model_fields["out"]


def _models_of(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_of(argument)]
