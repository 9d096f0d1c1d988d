"""Where a source's bands begin: quantiles of its records' numbers, weighted by text, measured once.

Weighted by text, because shares are shares of tokens: bands that hold as much text each are gone through at the same
pace when they have the same share. Of ten documents of 10, 10, …, 10 and 910 characters, two bands of five documents
each would hold 5 and 95 % of the text.

A source of at most 16 MB is measured as a whole. Of a larger one 64 places, evenly spread over it, count alike:

    plain `.jsonl`         256 KB there: with records of 4 KB some 4,000 in all, a quantile within 1 %
    compressed `.jsonl`    only the beginnings of files: 16 MB of text, split among them
    row groups, the rest   the unit there, up to 64 MB in all; of row groups only the columns needed

So edges are near the true quantiles, and that every record is in exactly one band does not rest on them.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_scheduler.bands import LENGTH, band_of, is_number
from data_scheduler.config import BandConfig, BandsConfig, SourceConfig
from data_scheduler.extract import Extractor, lookup
from data_scheduler.formats.records import MarkedText, Records
from data_scheduler.manifest import Manifest
from data_scheduler.paths import file_kind
from data_scheduler.pieces import Piece
from data_scheduler.reading import TOKEN_KINDS, UnitReader
from data_scheduler.sample_places import beginning, places_of, window
from headrace.errors import ConfigError

PLACES = 64
PLACE_BYTES = 256 << 10
WHOLE_BYTES = PLACES * PLACE_BYTES
UNIT_BYTES = 64 << 20
"""Text of row groups and whole files; the first is read whatever its size."""
FIELDS_NAMED = 12

Floats = npt.NDArray[np.float64]


class _Seen(NamedTuple):
    """A record of the sample."""

    value: Any
    """What is in the field, None when there is none."""
    characters: int


class _Watching(Extractor):
    """Notes the number and the length of every document it makes."""

    def __init__(self, config: SourceConfig, by: str, columns: bool) -> None:
        """columns: whether column files have the field, which then has to be asked for."""
        super().__init__(config)
        self._by = by
        self.seen: list[_Seen] = []
        self.fields: dict[str, None] = {}
        self.problem = ""
        """Why the first record that could not be used could not."""
        if columns:
            self.columns = sorted({*self.columns, by.split(".")[0]})
            self.text_columns = [column for column in self.text_columns if column != by]

    @property
    def is_plain(self) -> bool:
        """Never: the field is wanted too."""
        return False

    def hear(self, records: Records) -> None:
        """Take note of what could not be used."""
        if records.rejects and not self.problem:
            self.problem = records.rejects[0].reason

    def add_bare(self, text: str, records: Records) -> None:
        """As the other, and note it."""
        super().add_bare(text, records)
        self._note({}, records)

    def _add_text(self, row: Mapping[str, Any], records: Records) -> None:
        super()._add_text(row, records)
        self._note(row, records)

    def _note(self, row: Mapping[str, Any], records: Records) -> None:
        document = records.documents[-1]
        if len(self.fields) < FIELDS_NAMED:
            self.fields |= dict.fromkeys(row)
        if document is not None:
            text = document.text if isinstance(document, MarkedText) else document
            self.seen.append(_Seen(lookup(row, self._by), len(text)))


def measure(source: SourceConfig, manifest: Manifest) -> BandConfig:
    """The first band of a source with `bands`; the others differ in their number only.

    Raises ConfigError when no record has the number, when there are fewer different ones than bands, when a band would
    have no record, and for files of token ids.
    """
    bands = source.bands
    assert bands is not None, "asked of sources with bands only"
    where = f"data.sources.{source.name}.bands"
    for path, _ in manifest.files:
        if file_kind(path, source.format)[0] in ("npy", *TOKEN_KINDS):
            raise ConfigError(f"{where}: {path} holds token ids, which have no {bands.by!r} to tell bands by")
    seen, weights, watching = _sample(source, bands, manifest, columns=True)
    good = [number for number, one in enumerate(seen) if is_number(one.value)]
    from_text = not good and bands.by == LENGTH
    if from_text:
        seen, weights, _ = _sample(source, bands, manifest, columns=False)
        good = list(range(len(seen)))
    if not good:
        raise ConfigError(f"{where}.by: no record has a number in {bands.by!r} ({_looked_at(seen, watching)})")
    values = np.array([float(seen[number].characters if from_text else seen[number].value) for number in good])
    weights = weights[good]
    if not weights.any():
        raise ConfigError(f"{where}: no record of the sample has any text")
    edges = _quantiles(values, weights, bands, where) if bands.edges is None else bands.edges
    numbers = np.array([band_of(value, edges, bands.order) for value in values.tolist()])
    parts = np.bincount(numbers, weights, minlength=bands.number + 1)[1:]
    for number, part in enumerate(parts.tolist(), 1):
        if not part:
            raise ConfigError(
                f"{where}: band {source.name}.{number} has no text among {len(good):,} records of {bands.by!r} from "
                f"{values.min():g} to {values.max():g}; move the edges"
            )
    shares = (parts / parts.sum()).tolist()
    return BandConfig(
        of=source.name,
        number=1,
        by=bands.by,
        order=bands.order,
        edges=[float(edge) for edge in edges],
        measured=bands.edges is None,
        from_text=from_text,
        shares=shares,
    )


def _quantiles(values: Floats, weights: Floats, bands: BandsConfig, where: str) -> list[float]:
    """Where each band but the lowest begins: the value that is nearest to the quantile, of those that leave every band
    a value of its own."""
    different, inverse = np.unique(values, return_inverse=True)
    count = bands.number
    if len(different) < count:
        raise ConfigError(
            f"{where}: {len(values):,} records have {len(different)} different {_plural(len(different))} of "
            f"{bands.by!r}, fewer than {count} bands; lower count, or take another field"
        )
    below = np.cumsum(np.bincount(inverse.reshape(-1), weights)) / weights.sum()
    edges, first = [], 1
    for number in range(1, count):
        last = len(different) - (count - number)
        # below[i - 1] is the part of the text whose number is less than different[i].
        at = first + int(np.abs(below[first - 1 : last] - number / count).argmin())
        edges.append(float(different[at]))
        first = at + 1
    return edges


def _plural(count: int) -> str:
    return "value" if count == 1 else "values"


def _looked_at(seen: Sequence[_Seen], watching: _Watching) -> str:
    if not seen:
        return watching.problem or "no record of the sample is a document"
    kinds = sorted({type(one.value).__name__ for one in seen if one.value is not None})
    if kinds:
        return f"it holds {', '.join(kinds)}"
    fields = ", ".join(watching.fields)
    return f"fields: {fields}" if fields else "its records are texts without fields; only `length` is known"


def _sample(
    source: SourceConfig, bands: BandsConfig, manifest: Manifest, columns: bool
) -> tuple[list[_Seen], Floats, _Watching]:
    """(records, float64[records] parts of the source's text they stand for, what noted them)."""
    units = UnitReader(source, sizes=dict(manifest.files))
    units.extractor = watching = _Watching(source, bands.by, columns)
    records: list[_Seen] = []
    weights: list[Floats] = []
    for places in _read(units, watching, list(manifest.pieces(source))):
        found, watching.seen = watching.seen, []
        sizes = np.array([one.characters for one in found], np.float64)
        records += found
        weights.append(sizes if places == 0 else sizes * (places / max(1.0, sizes.sum())))
    return records, np.concatenate([np.zeros(0), *weights]), watching


def _read(units: UnitReader, watching: _Watching, pieces: Sequence[Piece]) -> Iterator[int]:
    """Read some of the source; after each reading the number of places it stands for, 0 when all are read."""
    if sum(piece.size for piece in pieces) <= WHOLE_BYTES:
        for piece in pieces:
            watching.hear(units.read(piece.unit))
            yield 0
        return
    places, read = places_of(pieces, PLACES), 0
    for number, offsets in places.items():
        piece = pieces[number]
        if piece.cut == "bytes":
            for offset in offsets:
                window(units, piece, offset, PLACE_BYTES)
                yield 1
        elif piece.cut == "lines":
            beginning(units, piece, WHOLE_BYTES // len(places))
            yield len(offsets)
        elif read < UNIT_BYTES:
            read += piece.size
            watching.hear(units.read(piece.unit))
            yield len(offsets)
