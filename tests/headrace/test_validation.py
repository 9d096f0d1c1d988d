"""Mistakes in a configuration, named by the key's path with what to do."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from headrace.errors import ConfigError
from headrace.validation import validated


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Near(Strict):
    kind: Literal["near"]
    reach: Annotated[int, Field(ge=1)] = 1


class Far(Strict):
    kind: Literal["far"]


class Item(Strict):
    name: str
    size: int = 1


class Whole(Strict):
    items: list[Item] = Field(default=[])
    steps: list[Annotated[Near | Far, Field(discriminator="kind")]] = Field(default=[])
    options: dict[Annotated[str, Field(pattern="^[a-z]+$")], str | int] = Field(default={})
    first: Item | None = None
    last: int = Field(default_factory=lambda data: len(data["items"]))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"itmes": []}, "x: unknown key itmes (did you mean 'items'?)"),
        ({"zzz": 1}, "x: unknown key zzz (valid: items, steps, options, first, last)"),
        ({"items": [{"name": "web", "sise": 1}]}, "x: unknown key items.web.sise (did you mean 'size'?)"),
        ({"items": [{"size": 1}]}, "x: items.0.name is required"),
        ({"items": [{"name": "web", "size": "a"}]}, "x: items.web.size: input should be a valid integer, got 'a'"),
        ({"items": ["web"]}, "x: items.0: expected a section with keys of: name, size, got 'web'"),
        ({"first": {"nam": "web"}}, "x: first.name is required; unknown key first.nam (did you mean 'name'?)"),
        ({"steps": [{"kind": "far"}, {"kind": "near", "rech": 2}]}, "unknown key steps.1.rech (did you mean 'reach'?)"),
        ({"steps": [{"kind": "near", "reach": 0}]}, "x: steps.0.reach: input should be greater than or equal to 1"),
        ({"steps": [{"kind": "neer"}]}, "x: steps.0: no kind 'neer' (did you mean 'near'?)"),
        ({"steps": [{}]}, "x: steps.0.kind is required"),
        ({"steps": ["near"]}, "x: steps.0: expected a section, got 'near'"),
        (
            {"options": {"a": 1.5}},
            "x: options.a: input should be a valid string, got 1.5; options.a: input should be a",
        ),
        ({"options": {"A": 1}}, "x: options.A: string should match pattern '^[a-z]+$', got 'A'"),
        ({1: 2}, "x: 1: keys should be strings, got 1"),
        ({"items": [{"name": 1}]}, "x: items.0.name: input should be a valid string, got 1"),
        ([], "x: the file: expected a section with keys of: items, steps, options, first, last"),
    ],
)
def test_every_mistake_in_one_line(raw: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validated(Whole, raw, "x")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "factory" not in str(caught.value)  # what follows from the mistake is not another one


def test_places_can_be_named_one_by_one() -> None:
    raw = {"steps": [{"kind": "near", "reach": 0}], "itmes": 1}
    with pytest.raises(ConfigError) as caught:
        validated(Whole, raw, lambda location: f"x:{len(location)}", ("part",))
    assert "x:4: part.steps.0.reach: " in str(caught.value)
    assert "x:2: unknown key part.itmes" in str(caught.value)


def test_what_is_right_comes_through() -> None:
    assert validated(Whole, {"steps": [{"kind": "far"}]}, "x").steps == [Far(kind="far")]
