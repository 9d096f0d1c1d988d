"""Files and records under quarantine: documents that are passed over from some step on.

A source has *generations*: it begins with 1, and gets another when files join it, when a person takes one of its files
or records out, and when that is undone. A generation begins at a journaled step. A lane's place in a source counts the
documents that are left out like any others, so it means the same in every generation; with the generation it says which
documents follow. A document that was begun is broken off; a window of `best_fit` that was laid out before the step is
given as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from data_scheduler.formats.records import Records
from data_scheduler.order import Int64
from data_scheduler.reading import layout_units
from data_scheduler.sequences import BoolArray
from data_scheduler.stretch import Stretch
from headrace.errors import ConfigError

if TYPE_CHECKING:
    from data_scheduler.source import SourceReader


class Part(NamedTuple):
    """A file, or one record of it, named as `headrace data trace` names it."""

    file: str
    record: int | None = None
    within: tuple[int, int] | None = None
    """Byte range of the file's text that the record is counted in; None: the whole file."""

    def __str__(self) -> str:
        record = "" if self.record is None else f":{self.record}"
        return self.file + record + ("" if self.within is None else "@{}-{}".format(*self.within))


@dataclass(frozen=True)
class LeftOut:
    """A part of a source, and for how long it is left out."""

    part: Part
    first: int
    """First generation without it."""
    stop: int | None = None
    """First generation with it again; None: not undone."""

    def holds(self, generation: int) -> bool:
        """Whether it is left out then."""
        return self.first <= generation and (self.stop is None or generation < self.stop)


def mask(reader: "SourceReader", chunk: int, places: Int64, generation: int) -> BoolArray | None:
    """bool[places]: which of a chunk's records are left out in a generation; None when none is."""
    path = reader.chunks[chunk].unit.path
    found: BoolArray | None = None
    for out in reader.left_out:
        if out.part.file != path or not out.holds(generation):
            continue
        if out.part.record is None:
            return np.ones(len(places), np.bool_)
        place = place_of(reader, chunk, out.part)
        if place is not None:
            found = (places == place) | (False if found is None else found)
    return found


def place_of(reader: "SourceReader", chunk: int, part: Part) -> int | None:
    """The place of a record among those of a chunk of its file; None when it is not in that chunk."""
    assert part.record is not None, "asked of records only"
    cut = reader.chunks[chunk]
    layout = reader.manifest.row_groups.get(cut.unit.path)
    if layout is not None:
        at = layout_units(cut.unit.path, reader.config.format, layout).index(cut.unit)
        rows = cut.rows(layout[at][0])
        first = sum(records for records, _ in layout[:at]) + rows.start
        return part.record - first if part.within is None and first <= part.record < first + len(rows) else None
    if cut.block:
        if part.within is None or part.within[0] // cut.block % cut.parts != cut.part:
            return None
        records: Records = reader.read(chunk)
        firsts = [place for place, number in records.blocks if number * cut.block == part.within[0]]
        place = (firsts[0] if firsts else 0) + part.record
        known = firsts and place < len(records.documents)
        return place if known and reader.record_number(chunk, records, place) == (part.record, part.within) else None
    within = None if cut.unit.stop < 0 else (cut.unit.start, cut.unit.stop)
    place, rest = divmod(part.record - cut.part, cut.parts)
    return place if part.within == within and place >= 0 and rest == 0 else None


def check_part(reader: "SourceReader", part: Part, out: Sequence[Part]) -> None:
    """Raise ConfigError when a source has no such file or record, or when nothing would be left of it without it and
    those that are `out` already."""
    files = [path for path, size in reader.manifest.files if size]
    name = reader.config.name
    if part.file not in files:
        raise ConfigError(f"source {name!r} has no file {part.file!r}; name it as `headrace data trace` does")
    if part in out or Part(part.file) in out:
        raise ConfigError(f"{part} of {name!r} is under quarantine already")
    if part.record is None:
        gone = {part.file, *(other.file for other in out if other.record is None)}
        if gone.issuperset(files):
            raise ConfigError(f"nothing would be left of source {name!r}; put all of it under quarantine")
        return
    for chunk in reader.chunks_of(part.file):
        place = place_of(reader, chunk, part)
        if place is not None:
            documents = reader.read(chunk).documents
            if place < len(documents) and documents[place] is not None:
                return
            break
    raise ConfigError(
        f"{part} is no document of source {name!r}; name the record as `headrace data trace` does, "
        "FILE:RECORD or FILE:RECORD@BEGIN-END where it says `of bytes BEGIN-END`"
    )


def with_gaps(kept: Stretch, out: BoolArray, ids: Int64) -> Stretch:
    """A stretch with the documents that are left out put back in as pieces without a token, so that places count them.

    kept: the others; out: bool[pieces]; ids: int64[pieces] of all.
    """
    # A gap begins where the next document that is kept does, or at the end.
    edges = np.append(kept.begins, len(kept.tokens))
    begins = edges[np.cumsum(~out) - ~out]
    prefixes = None
    if kept.prefix_lengths is not None:
        prefixes = np.zeros(len(ids), np.int64)
        prefixes[~out] = kept.prefix_lengths
    return Stretch(kept.tokens, begins, ids, np.zeros(len(ids), np.int64), kept.weights, prefixes)


def empty(out: BoolArray, ids: Int64, dtype: type[np.unsignedinteger]) -> Stretch:
    """A stretch of documents all of which are left out."""
    none = np.zeros(0, np.int64)
    return with_gaps(Stretch(np.zeros(0, dtype), none, none, none), out, ids)
