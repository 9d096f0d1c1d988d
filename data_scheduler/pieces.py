"""What a source is before it is cut: the units of its files, with their text and how they can be cut.

A source may have millions of files, so units are columns of numbers and a `Piece` is made when it is asked for: 29
bytes each, not 250.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_scheduler.formats.records import Unit
from data_scheduler.order import Int64
from data_scheduler.paths import file_kind
from data_scheduler.reading import TOKEN_KINDS

TEXT_PER_COMPRESSED_BYTE = 4
"""Guess of the text behind a compressed byte (3.2 to 4.6 on English and code at common levels)."""
CUTS = ("bytes", "lines", "rows", "documents", "records")
"""How a unit can be cut: by bytes, by blocks of a stream's lines, by rows, by rows that are found without reading, by
records."""

Files = Sequence[tuple[str, int]]
Layout = Sequence[tuple[int, int]]


class Piece(NamedTuple):
    """A unit that is about to be cut."""

    unit: Unit
    size: int
    """Bytes of text."""
    cut: str
    """One of CUTS."""


@dataclass(frozen=True, eq=False)
class Pieces:
    """Pieces as columns, in file order."""

    files: Files
    """(path, bytes)."""
    file: npt.NDArray[np.int32]
    """int32[pieces], the number of each one's file."""
    start: Int64
    stop: Int64
    sizes: Int64
    cut: npt.NDArray[np.int8]
    """int8[pieces], places in CUTS."""

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, at: int) -> Piece:
        return Piece(self.unit(at), int(self.sizes[at]), CUTS[self.cut[at]])

    def __iter__(self) -> Iterator[Piece]:
        return (self[at] for at in range(len(self)))

    def unit(self, at: int) -> Unit:
        """The unit of a piece."""
        return Unit(self.files[int(self.file[at])][0], int(self.start[at]), int(self.stop[at]))

    def are(self, cut: str) -> npt.NDArray[np.bool_]:
        """bool[pieces], which are cut so."""
        found: npt.NDArray[np.bool_] = self.cut == CUTS.index(cut)
        return found

    @staticmethod
    def joined(tables: Sequence["Pieces"]) -> "Pieces":
        """The pieces of all the tables, one table after the other."""
        firsts = itertools.accumulate((len(table.files) for table in tables), initial=0)
        files = [table.file + np.int32(first) for table, first in zip(tables, firsts, strict=False)]
        return Pieces(
            list(itertools.chain.from_iterable(table.files for table in tables)),
            np.concatenate(files),
            *(np.concatenate([getattr(table, name) for table in tables]) for name in ("start", "stop", "sizes", "cut")),
        )


def pieces_of(files: Files, layouts: Mapping[str, Layout], format: str) -> Pieces:
    """The pieces of every file that is not empty. Raises ConfigError for a file whose format is not known.

    layouts: (records, bytes of text) of each row group, record batch or stretch of documents, of files that have them.
    """
    sizes = np.fromiter((size for _, size in files), np.int64, len(files))
    file = np.flatnonzero(sizes).astype(np.int32)
    some = files if len(file) == len(files) else [files[number] for number in file.tolist()]
    numbers: dict[tuple[str, str | None], int] = {}
    kind = np.fromiter(
        (numbers.setdefault(file_kind(path, format), len(numbers)) for path, _ in some), np.int64, len(some)
    )
    factors = np.array([TEXT_PER_COMPRESSED_BYTE if suffix else 1 for _, suffix in numbers], np.int64)
    cuts = np.array([_cut(*kind) for kind in numbers], np.int8)
    start, stop = np.zeros(len(file), np.int64), np.full(len(file), -1, np.int64)
    whole = Pieces(files, file, start, stop, sizes[file] * factors[kind], cuts[kind])
    if not layouts:
        return whole
    found = [layouts.get(path) for path, _ in some]
    tokens = np.array([kind in TOKEN_KINDS for kind, _ in numbers], np.bool_)
    return _laid_out(whole, found, tokens[kind])


def _cut(kind: str, compression: str | None) -> int:
    return CUTS.index("records" if kind != "jsonl" else "bytes" if compression is None else "lines")


def _laid_out(whole: Pieces, layouts: Sequence[Layout | None], tokens: npt.NDArray[np.bool_]) -> Pieces:
    """`whole`, one piece a file, with the parts of those that have a layout in their place.

    tokens: bool[files], whose parts are named by the documents in them, not by their number.
    """
    laid = np.array([layout is not None for layout in layouts], np.bool_)
    count = np.array([1 if layout is None else len(layout) for layout in layouts], np.int64)
    of = np.repeat(np.arange(len(layouts)), count)
    parts = itertools.chain.from_iterable(layout for layout in layouts if layout is not None)
    numbers: Int64 = np.fromiter(itertools.chain.from_iterable(parts), np.int64).reshape(-1, 2)
    inside = laid[of]
    columns: dict[str, npt.NDArray[Any]] = {
        name: getattr(whole, name)[of] for name in ("start", "stop", "sizes", "cut")
    }
    # Units a part is long in what it is named by; its start is what is before it in its file.
    long = np.ones(len(of), np.int64)
    by_documents = tokens[of] & inside
    long[by_documents] = numbers[by_documents[inside], 0]
    before = np.cumsum(long) - long
    firsts = np.cumsum(count) - count
    start = before - before[firsts[of]]
    columns["start"][inside], columns["stop"][inside] = start[inside], (start + long)[inside]
    columns["sizes"][inside] = np.maximum(1, numbers[:, 1])
    columns["cut"][inside] = np.where(by_documents, CUTS.index("documents"), CUTS.index("rows"))[inside]
    return Pieces(whole.files, whole.file[of], **columns)
