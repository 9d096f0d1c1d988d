"""What pydantic finds wrong with a configuration, in words for the person who wrote it.

    validated(RunConfig, {"model": {"num_layer": 2}}, "run.yaml")
    ConfigError: run.yaml: model.num_layers is required; unknown key model.num_layer (did you mean 'num_layers'?)

Keys are named by their path in the file: items of a list by their `name` where they have one, else by their number;
what pydantic adds to a path to say which member of a union it tried is left out.
"""

import difflib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from headrace.errors import ConfigError
from headrace.yaml_file import Location

Model = TypeVar("Model", bound=BaseModel)


def validated(model: type[Model], raw: object, where: str | Callable[[Location], str], section: Location = ()) -> Model:
    """`raw` as a `model`. Raises ConfigError with every mistake, in one line.

    `where` names the file, or says for each place in `raw` what to call it; `section` is the path of `raw` in the file.
    """
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        said: dict[str, None] = {}
        for problem in error.errors():
            if problem["type"] == "default_factory_not_called":
                continue  # follows from another mistake
            place = _place(model, raw, problem["loc"])
            message = _describe(problem, place, ".".join(map(str, (*section, *place.names))))
            said[message if isinstance(where, str) else f"{where((*section, *place.location))}: {message}"] = None
        prefix = f"{where}: " if isinstance(where, str) else ""
        raise ConfigError(prefix + "; ".join(said)) from None


class _Place(NamedTuple):
    location: Location
    names: list[str]
    keys: list[str]
    """Valid keys of the section that holds the place."""
    inside: list[str]
    """Valid keys of the section that the place is, if it is one."""


def _place(model: type[BaseModel], raw: object, location: Location) -> _Place:
    """Follows pydantic's `location` through models and data at once."""
    annotation: Any = model
    node: Any = raw
    parts: list[str | int] = []
    names: list[str] = []
    keys: list[str] = []
    for part in location:
        models = _models_in(annotation)
        if len(models) > 1 and isinstance(part, str):  # the member of a union, by its `kind`
            annotation = next(inner for inner in models if part in get_args(inner.model_fields["kind"].annotation))
            continue
        if not isinstance(node, dict | list):
            break  # the member of a union of plain types
        keys = list(models[0].model_fields) if models else []
        try:
            node = node[part]  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            node = None
        named = isinstance(part, int) and isinstance(node, dict) and isinstance(node.get("name"), str)
        parts.append(part)
        names.append(node["name"] if named else str(part))
        if isinstance(part, str):
            annotation = models[0].model_fields[part].annotation if part in keys else None
    inside = _models_in(annotation)
    return _Place(tuple(parts), names, keys, list(inside[0].model_fields) if len(inside) == 1 else [])


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _describe(problem: Any, place: _Place, key: str) -> str:
    kind, value = problem["type"], problem.get("input")
    if kind == "extra_forbidden":
        return f"unknown key {key}" + _nearest(str(place.location[-1]), place.keys)
    if kind == "missing":
        return f"{key} is required"
    if kind == "union_tag_invalid":
        known = [name.strip(" '") for name in problem["ctx"]["expected_tags"].split(",")]
        return f"{key}: no kind {problem['ctx']['tag']!r}" + _nearest(problem["ctx"]["tag"], known)
    if kind == "union_tag_not_found":
        return f"{key}.kind is required"
    shown = f", got {value!r}" if isinstance(value, str | int | float | bool) else ""
    if kind in ("model_type", "model_attributes_type"):
        known_keys = f" with keys of: {', '.join(place.inside)}" if place.inside else ""
        return f"{key or 'the file'}: expected a section{known_keys}{shown}"
    message = problem["msg"].removeprefix("Value error, ").replace(" after validation", "")
    message = message[0].lower() + message[1:] + shown
    return f"{key}: {message}" if key else message


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else f" (valid: {', '.join(known)})"
