"""Bands: which records of a source are in which, by a number that each record has.

    edges 0.2, 0.5, 0.9       band 1 |  0.2  band 2  |  0.5  band 3  |  0.9  band 4
    number 0.5                                          x

An edge is where the next band begins, so a number on an edge is in the band above it, and every number is in exactly
one. With `order: descending` the same intervals are numbered from the other end. What has no number (a field that is
missing, no number or NaN; a line that is no JSON; a file that cannot be read) is a *stray*: band 1 rejects it, the
others leave it to band 1, so that it is counted once.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

from data_scheduler.config import BandConfig, DataConfig, SourceConfig

BIGGEST = 1 << 1023
"""Whole numbers from here on have no float."""
LENGTH = "length"
"""The name of the number that every text has."""


def band_of(value: float, edges: Sequence[float], order: str) -> int:
    """The number of the band that `value` is in, 1 for the easiest."""
    interval = bisect_right(edges, value)
    return interval + 1 if order == "ascending" else len(edges) + 1 - interval


def is_number(value: Any) -> bool:
    """Whether records can be told apart by it: finite, and not true or false."""
    if type(value) is int:
        return abs(value) < BIGGEST
    return type(value) is float and math.isfinite(value)


class BandFilter:
    """Which records are one band's."""

    def __init__(self, band: BandConfig) -> None:
        self.by, self.from_text, self.takes_strays = band.by, band.from_text, band.number == 1
        self._number, self._edges, self._order = band.number, band.edges, band.order
        bounds = [-math.inf, *band.edges, math.inf]
        place = band.number - 1 if band.order == "ascending" else len(band.edges) + 1 - band.number
        self._low, self._high = bounds[place], bounds[place + 1]

    def holds(self, value: float) -> bool:
        """Whether a record with this finite number is one of the band's; as `band_of`, for one band."""
        return self._low <= value < self._high

    def without(self, value: Any) -> str:
        """Why a record whose field is `value`, which is no number, is in no band."""
        said = "missing" if value is None else f"{value!r:.40}, not a number"
        return f"field {self.by!r} is {said}, so the record is in no band"

    @property
    def key(self) -> list[Any]:
        """What its records depend on, as plain data."""
        return [self.by, self.from_text, self._number, self._edges, self._order]


def base_name(source: SourceConfig) -> str:
    """The name of the source that a band is of, or of the source itself: what they have in common reads the same
    files."""
    return source.name if source.band is None else source.band.of


def part_of(source: SourceConfig) -> float:
    """The part of its files' text that a source is, 1 for all but bands."""
    return 1.0 if source.band is None else source.band.shares[source.band.number - 1]


def bands_of(config: DataConfig) -> dict[str, tuple[str, ...]]:
    """source → its bands, easiest first."""
    found: dict[str, list[tuple[int, str]]] = {}
    for source in config.sources:
        if source.band is not None:
            found.setdefault(source.band.of, []).append((source.band.number, source.name))
    return {of: tuple(name for _, name in sorted(bands)) for of, bands in found.items()}


def split(source: SourceConfig, band: BandConfig) -> Iterator[SourceConfig]:
    """The sources that take the place of one with `bands`. `band`: any of them; the weight goes by the text in each."""
    for number, share in enumerate(band.shares, 1):
        own = {
            "name": f"{source.name}.{number}",
            "bands": None,
            "band": band.model_copy(update={"number": number}),
            "weight": source.weight * share,
        }
        yield source.model_copy(update=own)
