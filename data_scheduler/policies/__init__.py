"""Policies: who sets the mixture weights.

A policy is a class with a `weights` method, one file each. Those that come with Headrace are in `BUILT_IN`; a package
of your own adds one through the entry-point group `headrace.policies`, with two lines in its `pyproject.toml`
(`examples/custom_policy/`). Worked example: `static.py`, ten lines. What bounds every policy is in `guard.py`.

A constructor takes the configured weights, the policy's options as keywords and, where it has a parameter of that name,
`context`: what a policy may know of its run (`context.py`).
"""

import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Final, Protocol, cast

from pydantic import ValidationError

from data_scheduler.policies.context import Context
from headrace.errors import ConfigError

BUILT_IN: Final[Mapping[str, str]] = {
    "ado": "data_scheduler.policies.ado:Ado",
    "aioli": "data_scheduler.policies.aioli:Aioli",
    "doremi": "data_scheduler.policies.doremi:DoReMi",
    "mastery": "data_scheduler.policies.mastery:Mastery",
    "odm": "data_scheduler.policies.odm:Odm",
    "pacing": "data_scheduler.policies.pacing:Pacing",
    "proportional": "data_scheduler.policies.proportional:Proportional",
    "schedule": "data_scheduler.policies.schedule:Schedule",
    "skill_it": "data_scheduler.policies.skill_it:SkillIt",
    "static": "data_scheduler.policies.static:Static",
    "temperature": "data_scheduler.policies.temperature:Temperature",
    "unimax": "data_scheduler.policies.unimax:UniMax",
}
"""name → `module:class`; `pyproject.toml` lists the same as entry points, for other tools to see."""


@dataclass(frozen=True)
class Feedback:
    """What the model reported about one step, summed over all ranks."""

    step: int
    source_loss: Mapping[str, float] = field(default_factory=dict)
    """Mean loss per token, in nats, of each source that had tokens; NaN or infinite where the model's was."""
    source_tokens: Mapping[str, int] = field(default_factory=dict)
    """Tokens that had a loss."""
    validation_loss: Mapping[str, float] = field(default_factory=dict)
    """Held-out loss per token of each source, in nats, measured just before this step; empty where there was none."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """The mixture the step was drawn with, summing to 1, as the journal has it: whoever set it, guard and people
    included. Filled in by the scheduler."""


class Policy(Protocol):
    """Decides the mixture. Given the same calls it must give the same answers: no clock, no unseeded randomness.

    A policy that lives on held-out losses may have a method `wants_validation(step) -> bool` as well: whether they
    should be measured just before `step`. A pure function of the step.
    """

    uses_feedback: bool
    """Whether `weights` looks at feedback; if not, planning never waits for training."""

    def weights(self, step: int, feedback: Sequence[Feedback]) -> Mapping[str, float]:
        """Weights (any positive scale) for `step`.

        feedback: the steps reported since the last call, oldest first, none later than `step − horizon`.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What must be saved to go on, as plain JSON data. Asked every step; what was given must not change later."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state; `{}` is that of a run that has not begun."""
        ...


def make_policy(
    kind: str, options: Mapping[str, Any], initial: Mapping[str, float], context: Context | None = None
) -> Policy:
    """The policy named `kind` with its options. `initial` maps source names, in order, to their configured weights.

    Raises ConfigError for an unknown name, options the policy does not take, or what it needs and `context` lacks.
    """
    policy = _find(kind)
    arguments = dict(options)
    if "context" in arguments:
        raise ConfigError(f"data.policy.options of {kind!r}: 'context' is not an option")
    try:
        if "context" in inspect.signature(policy).parameters:
            arguments["context"] = context or Context(tuple(initial))
        return cast(Policy, policy(initial, **arguments))
    except ValidationError as error:
        raise ConfigError(f"data.policy.options of {kind!r}: {_describe(error)}") from None
    except TypeError as error:
        raise ConfigError(f"data.policy.options of {kind!r}: {str(error).split('__init__() ')[-1]}") from None


def _find(kind: str) -> Any:
    """The class behind a name. An entry point that hides a built-in policy, or another's, is refused, not chosen."""
    offered: dict[str, set[str]] = {}
    for entry in entry_points(group="headrace.policies"):
        offered.setdefault(entry.name, set()).add(entry.value)
    others = offered.get(kind, set()) - {BUILT_IN.get(kind)}
    if len(others) > 1 or (others and kind in BUILT_IN):
        names = ", ".join(sorted(others | {BUILT_IN[kind]} if kind in BUILT_IN else others))
        raise ConfigError(f"data.policy.kind: {kind!r} is the name of more than one policy ({names}); rename your own")
    found = next(iter(others), BUILT_IN.get(kind))
    if found is None:
        known = ", ".join(sorted({*BUILT_IN, *offered}))
        raise ConfigError(f"data.policy.kind: no policy {kind!r} (known: {known})")
    module, _, name = found.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"data.policy.kind: policy {kind!r} ({found}) cannot be loaded: {error}") from None


def _describe(error: ValidationError) -> str:
    """What is wrong with the options, a clause each."""
    said = []
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "unexpected_keyword_argument":
            said.append(f"no option {name!r}")
        elif problem["type"] in ("missing_argument", "missing_keyword_only_argument"):
            said.append(f"{name} is required")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            said.append(f"{name}: {message[0].lower()}{message[1:]}, got {problem['input']!r}")
    return "; ".join(said)
