"""What a policy may know of its run besides losses, all of it in the journal or fixed by the configuration.

Numbers from outside (sizes of sources, another run's losses, a graph in a file) go through `recall`: measured when the
run begins, written to the journal (`policy_input`), and read back from there whenever the run goes on. So a resumed run
decides with the numbers it began with, though files may have changed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from headrace.errors import ConfigError


class SourceSize(NamedTuple):
    """What one epoch of a source holds."""

    bytes: int
    """Text as the manifest counts it, estimated for compressed files."""
    tokens: float
    """Estimated from a few places of it (`token_estimate.py`)."""


def _not_known(*_: Any) -> Any:
    raise ConfigError("data.policy: this policy needs a run's files, and was made without one")


def _measured(_: str, measure: Callable[[], Any]) -> Any:
    return measure()


def part_of_run(run_steps: int | None, most: int) -> int:
    """A tenth of the run, at most `most`, which it is too where the run's length is not known."""
    return most if run_steps is None else min(most, max(1, run_steps // 10))


@dataclass(frozen=True)
class Context:
    """Handed to policies whose constructor has a parameter `context`."""

    names: tuple[str, ...]
    """The sources, in order."""
    run_steps: int | None = None
    """Steps of the whole run, `train.steps`; None where only a scheduler is used."""
    horizon: int = 1
    """`data.policy.horizon`: steps until a measurement may shape a batch."""
    seed: int = 0
    """`data.seed`, for policies that need an order: `order.permutation(size, context.seed, "name", …)`."""
    bands: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Sources that were split into bands → the bands' names, easiest first."""
    held_out: frozenset[str] | None = None
    """Sources with `val_paths`; None: not known here."""
    size_of: Callable[[str], SourceSize] = _not_known
    """The size of a source; reads some 256 KB of it the first time in a run."""
    tokens_before: Callable[[int], int] = _not_known
    """Tokens of the steps before one, `seq_len` · `global_batch_size` each; of steps to come with the shape of the
    last. Not to be asked before the first call of `weights`."""
    recall: Callable[[str, Callable[[], Any]], Any] = _measured
    """`recall(name, measure)`: plain JSON data, from the journal where it has it, else measured now and journaled."""
