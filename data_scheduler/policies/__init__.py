"""Policies: who sets the mixture weights.

A policy is a class with a `weights` method; it is found by its name in the entry-point group `headrace.policies`, so a
package of your own adds one with two lines in its `pyproject.toml`. Worked example: `static.py`, ten lines.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Protocol, cast

from headrace.errors import ConfigError


@dataclass(frozen=True)
class Feedback:
    """What the model reported about one step, summed over all ranks."""

    step: int
    source_loss: Mapping[str, float] = field(default_factory=dict)
    """Mean loss per token, in nats, of each source that had tokens."""
    source_tokens: Mapping[str, int] = field(default_factory=dict)
    """Tokens that had a loss."""


class Policy(Protocol):
    """Decides the mixture. Given the same calls it must give the same answers: no clock, no unseeded randomness."""

    uses_feedback: bool
    """Whether `weights` looks at feedback; if not, planning never waits for training."""

    def weights(self, step: int, feedback: Sequence[Feedback]) -> Mapping[str, float]:
        """Weights (any positive scale) for `step`.

        feedback: the steps reported since the last call, oldest first, none later than `step − horizon`.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What must be saved to go on, as plain JSON data."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        ...


def make_policy(kind: str, options: Mapping[str, Any], initial: Mapping[str, float]) -> Policy:
    """The policy named `kind` with its options. `initial` maps source names, in order, to their configured weights.

    Raises ConfigError for an unknown name or options the policy does not take.
    """
    known = {entry.name: entry for entry in entry_points(group="headrace.policies")}
    if kind not in known:
        raise ConfigError(f"data.policy.kind: no policy {kind!r} (known: {', '.join(sorted(known))})")
    policy = known[kind].load()
    try:
        return cast(Policy, policy(initial, **options))
    except TypeError as error:
        raise ConfigError(f"data.policy.options of {kind!r}: {str(error).split('__init__() ')[-1]}") from None
