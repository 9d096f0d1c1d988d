"""Losses for policies that listen to the model, where there is no model: for simulations."""

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from headrace.errors import ConfigError

FLAT_LOSS = 3.0
"""Nats per token where nothing is known: what a small model reaches on web text. Only differences between sources and
over steps can move a mixture, and a flat loss has none."""


class AssumedLosses(Protocol):
    """What a model is taken to report."""

    said: str
    """Where the losses are from, for people."""

    def at(self, step: int) -> Mapping[str, float]:
        """Loss per token of every source in a step, in nats."""
        ...


class FlatLosses:
    """The same loss for every source and step."""

    said = f"a flat loss ({FLAT_LOSS:g} nats for every source)"

    def __init__(self, names: Sequence[str]) -> None:
        self._losses = dict.fromkeys(names, FLAT_LOSS)

    def at(self, step: int) -> Mapping[str, float]:
        """The flat loss."""
        return self._losses


class RecordedLosses:
    """The losses of an earlier run: of each source the last that was recorded up to a step."""

    def __init__(self, records: Iterable[tuple[int, Mapping[str, float]]], names: Sequence[str], where: str) -> None:
        """`records`: (step, source → loss) in the order of steps; losses that are not finite are passed over.

        A source without any takes the mean of the others'. Raises ConfigError when no source of `names` has one.
        """
        self._steps: dict[str, list[int]] = {name: [] for name in names}
        self._losses: dict[str, list[float]] = {name: [] for name in names}
        self.last = -1
        """Last recorded step; its losses hold for all later ones."""
        for step, losses in records:
            for name, loss in losses.items():
                if name in self._steps and math.isfinite(loss):
                    self._steps[name].append(step)
                    self._losses[name].append(loss)
                    self.last = max(self.last, step)
        self._known = [name for name in names if self._steps[name]]
        self._names = names
        if not self._known:
            raise ConfigError(f"{where}: no loss of {', '.join(names)} there; give a run of the same sources")
        self.unknown = [name for name in names if not self._steps[name]]
        """Sources without a recorded loss."""
        self.said = f"the losses of {where}"

    def at(self, step: int) -> Mapping[str, float]:
        """The losses recorded last up to `step`; before a source's first, its first."""
        known = {name: self._losses[name][max(0, bisect_right(self._steps[name], step) - 1)] for name in self._known}
        mean = sum(known.values()) / len(known)
        return {name: known.get(name, mean) for name in self._names}
