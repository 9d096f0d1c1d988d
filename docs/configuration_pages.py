"""The reference pages made from pydantic models, and what makes tables; for docs/generate.py."""

import json
from collections.abc import Iterator
from typing import Any, get_args

from data_scheduler.prep.config import InputConfig, LocalExecutor, PrepConfig, SlurmExecutor, Step
from pretrain.config import RunConfig

NOTE = "<!-- Written by docs/generate.py; change the code it reads, then run it. -->"
Schema = dict[str, Any]

CONFIGURATION = f"""{NOTE}
# Configuration

A run is one YAML file with the sections below. Any key can be changed on the command line; list items are addressed by
number or, for sources, by name:

```bash
headrace train recipes/quickstart.yaml run.dir=runs/other train.steps=50 data.sources.code.weight=0.5
headrace config show recipes/quickstart.yaml train.steps=50   # the whole configuration, defaults filled in
headrace config schema                                        # JSON schema; editors complete and check YAML with it
```

An unknown key, one given twice, a wrong type or an impossible value is refused in one line that names the key, and the
nearest valid key where there is one. Keys without a default must be given. `[n]` stands for an item of a list.
"""

PREPARATION = f"""{NOTE}
# Configuration of `headrace data prep`

One YAML file; [Prepare data](how-to/prepare-data.md) shows one at work. Everything but `executor` decides the output.
"""


def configuration() -> str:
    """The page about every key of a run's configuration."""
    schema = RunConfig.model_json_schema()
    parts = [CONFIGURATION]
    for name, place in schema["properties"].items():
        path = f"{name}[n]" if place.get("type") == "array" else name
        parts += _sections(path, schema["$defs"][_reference(place)], schema["$defs"])
    return "\n".join(parts)


def _sections(path: str, model: Schema, models: dict[str, Schema], kind: str = "") -> Iterator[str]:
    """A section for `model`, followed by those of the models inside it."""
    yield f"## `{path}`{f' of `kind: {kind}`' if kind else ''}\n"
    if model.get("description"):
        yield f"{one_line(model['description'])}\n"
    inner: list[tuple[str, str, str]] = []
    rows = []
    required = {key for part in (model, *model.get("anyOf", ())[:1]) for key in part.get("required", ())}
    for key, place in model["properties"].items():
        reference = _reference(place)
        kinds = place.get("items", place).get("discriminator", {}).get("mapping", {})
        if kinds:
            below = f"{path}.{key}[n]" if place.get("type") == "array" else f"{path}.{key}"
            inner += [(below, each.rpartition("/")[2], name) for name, each in kinds.items()]
            what = "list of sections" if below.endswith("[n]") else "section"
            default = "" if key in required else f"`{json.dumps(place.get('default'))}`"
            rows.append((key, what, default, f"{place.get('description', '')} See `{below}`."))
        elif reference is not None:
            below = f"{path}.{key}[n]" if place.get("type") == "array" else f"{path}.{key}"
            inner.append((below, reference, ""))
            meaning = place.get("description") or models[reference].get("description", "")
            what = "list of sections" if below.endswith("[n]") else "section"
            default = "`null`" if {"type": "null"} in place.get("anyOf", ()) else ""
            rows.append((key, f"{what} or null" if default else what, default, f"{meaning} See `{below}`."))
        else:
            default = "" if key in required else f"`{json.dumps(place.get('default'))}`"
            rows.append((key, _type(place), default, place.get("description", "")))
    yield table(("key", "type", "default", "meaning"), [(f"`{row[0]}`", *row[1:]) for row in rows])
    for below, reference, name in inner:
        yield from _sections(below, models[reference], models, name)


def _reference(place: Schema) -> str | None:
    """Name of the model that a property holds, if it may be null too, or that its list items are; None for a plain
    value."""
    target = place.get("items", place)
    parts = [*target.get("allOf", ()), *target.get("anyOf", ())]
    reference = target.get("$ref") or next((part["$ref"] for part in parts if "$ref" in part), None)
    return None if reference is None else str(reference).rpartition("/")[2]


def _type(place: Schema) -> str:
    """A property's type in words."""
    if "anyOf" in place:
        kinds = [_type(part) for part in place["anyOf"] if part.get("type") != "null"]
        return " or ".join(kinds) + (" or null" if len(kinds) < len(place["anyOf"]) else "")
    if "discriminator" in place:
        return "sections"
    if "enum" in place:
        return ", ".join(f"`{value}`" for value in place["enum"])
    if "const" in place:
        return f"`{place['const']}`"
    if place["type"] == "array":
        return f"list of {_type(place['items'])}"
    name = {"integer": "integer", "number": "number", "string": "text", "boolean": "true/false", "object": "mapping"}
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {place[key]:g}" for key, sign in bounds.items() if key in place]
    return " ".join([name[place["type"]], ", ".join(limits)]).strip()


def preparation() -> str:
    """The page about every key of a preparation's configuration."""
    steps = [
        (f"kind: {step.model_fields['kind'].annotation.__args__[0]}", step) for step in get_args(get_args(Step)[0])
    ]
    executors = [("executor: `kind: local`", LocalExecutor), ("executor: `kind: slurm`", SlurmExecutor)]
    parts = [PREPARATION]
    models = [("The file", PrepConfig), ("`input`", InputConfig), *((f"steps: `{kind}`", step) for kind, step in steps)]
    for title, model in [*models, *executors]:
        schema = model.model_json_schema()
        parts.append(f"## {title}\n")
        parts.append(f"{one_line(schema['description'])}\n")
        rows = []
        for key, place in schema["properties"].items():
            inner = place.get("items", place)
            section = (
                ("list of sections" if inner is not place else "section") if {"$ref", "oneOf"} & set(inner) else None
            )
            default = "" if key in schema.get("required", ()) or section else f"`{json.dumps(place.get('default'))}`"
            if key != "kind":
                rows.append((f"`{key}`", section or _type(place), default, place.get("description", "")))
        if rows:
            parts.append(table(("key", "type", "default", "meaning"), rows))
    return "\n".join(parts)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join("| " + " | ".join(one_line(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def one_line(words: str) -> str:
    return " ".join(words.split())
