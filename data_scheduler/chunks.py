"""What is dealt to lanes: chunks, cut from a source's files by a rule that needs only the journaled manifest.

A chunk is a unit of a file (see `reading`), or one of several parts of a unit:

| unit | part p of n | why |
| --- | --- | --- |
| bytes of a plain `.jsonl` | cut by bytes, not into parts | can be read from anywhere |
| compressed `.jsonl` | the lines that begin in blocks p, p+n, p+2n, … of its text | a stream can be cut without knowing its length, and a wrong guess of it makes all parts larger or smaller alike |
| row group, record batch, stretch of documents | rows [R·p/n, R·(p+1)/n) of R | R is known; ranges can be copied in one pass |
| anything else | records p, p+n, p+2n, … | needs nothing but the records |
"""  # noqa: E501

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_scheduler.formats.records import Unit
from data_scheduler.order import Int64
from data_scheduler.pieces import CUTS, Pieces

MIN_CHUNK_BYTES = 1 << 10
BLOCKS_PER_PART = 4
"""Blocks in a part where the guess is right. One would leave a fifth of the parts empty at 3.2; with four, parts have
three or four."""
HELD_TEXT = 64 << 20
"""Text of cut files up to which a source is simply held in memory, a quarter of the unit cache: copies are for more."""
COPIED_PARTS = {"lines": 3, "rows": 9}
"""Parts from which a unit is copied. Without a copy each part costs reading the whole unit: n parts cost n·133/484 of
the time that encoding takes for zstd lines (133 and 484 MB per CPU-second), so half as much for 2, and n·133/1110 for
parquet, about as much for 8."""


class Chunk(NamedTuple):
    """A unit, or part `part` of `parts` of it."""

    unit: Unit
    part: int
    parts: int
    size: int
    """Bytes of text, estimated for compressed files; only used to balance lanes."""
    block: int = 0
    """Bytes of text of a block, where parts are sets of blocks; 0: they are not."""
    copied: bool = False
    """Whether the unit is read through a copy, when one can be made; changes nothing but speed."""

    def rows(self, total: int) -> range:
        """The part's rows, of a unit of `total`."""
        return range(total * self.part // self.parts, total * (self.part + 1) // self.parts)


@dataclass(frozen=True, eq=False)
class Chunks:
    """All chunks of a source, in file order: columns with a row for each piece; a `Chunk` is made when asked for."""

    pieces: Pieces
    parts: Int64
    """int64[pieces], how many chunks each is cut into."""
    block: Int64
    copied: npt.NDArray[np.bool_]
    firsts: Int64
    """int64[pieces + 1], the number of each one's first chunk, and how many chunks there are."""

    @staticmethod
    def of(pieces: Pieces, parts: Int64, block: Int64, copied: npt.NDArray[np.bool_]) -> "Chunks":
        """The chunks of pieces that are cut into so many parts."""
        firsts = np.zeros(len(parts) + 1, np.int64)
        np.cumsum(parts, out=firsts[1:])
        return Chunks(pieces, parts, block, copied, firsts)

    @staticmethod
    def joined(tables: Sequence["Chunks"]) -> "Chunks":
        """The chunks of all the tables, one table after the other."""
        if len(tables) == 1:
            return tables[0]
        parts, block = (np.concatenate([getattr(table, name) for table in tables]) for name in ("parts", "block"))
        copied = np.concatenate([table.copied for table in tables])
        return Chunks.of(Pieces.joined([table.pieces for table in tables]), parts, block, copied)

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def __getitem__(self, at: int) -> Chunk:
        if not 0 <= at < len(self):
            raise IndexError(f"chunk {at} of {len(self)}")
        piece = int(self.firsts.searchsorted(at, "right")) - 1
        unit, size = self.pieces.unit(piece), int(self.pieces.sizes[piece])
        part, parts = at - int(self.firsts[piece]), int(self.parts[piece])
        if CUTS[self.pieces.cut[piece]] == "bytes":
            edges = size * part // parts, size * (part + 1) // parts
            return Chunk(Unit(unit.path, *edges), 0, 1, edges[1] - edges[0])
        return Chunk(unit, part, parts, size // parts, int(self.block[piece]), bool(self.copied[piece]))

    def __iter__(self) -> Iterator[Chunk]:
        return (self[at] for at in range(len(self)))

    def sizes(self) -> Int64:
        """Bytes of text of every chunk, int64[chunks]."""
        quotient, rest = np.divmod(self.pieces.sizes, self.parts)
        sizes = np.repeat(quotient, self.parts)
        # A unit cut by bytes is cut without rest: part p of n begins at ⌊size·p/n⌋ = p·⌊size/n⌋ + ⌊(size mod n)·p/n⌋.
        cut = np.flatnonzero(self.pieces.are("bytes") & (rest > 0))
        parts, rest = np.repeat(self.parts[cut], self.parts[cut]), np.repeat(rest[cut], self.parts[cut])
        part = np.arange(len(parts)) - np.repeat(np.cumsum(self.parts[cut]) - self.parts[cut], self.parts[cut])
        at = np.repeat(self.firsts[cut], self.parts[cut]) + part
        sizes[at] += rest * (part + 1) // parts - rest * part // parts
        return sizes


def chunk_target(pieces: Pieces, chunk_bytes: int, lanes: int) -> int:
    """Bytes of text in a chunk: `chunk_bytes`, less where the source could not give every lane two such."""
    return max(MIN_CHUNK_BYTES, min(chunk_bytes, int(pieces.sizes.sum()) // (2 * lanes)))


def cut_pieces(pieces: Pieces, chunk_bytes: int, lanes: int) -> Chunks:
    """All chunks of a source, in file order; a pure function of the arguments."""
    target = chunk_target(pieces, chunk_bytes, lanes)
    parts = np.maximum(1, -(-pieces.sizes // target))
    # A power of two, so that files that join a source seldom change the blocks of those that were there.
    block = 1 << ((target // BLOCKS_PER_PART).bit_length() - 1)
    blocks = np.where(pieces.are("lines") & (parts > 1), block, 0)
    copied = np.zeros(len(pieces), np.bool_)
    for how, least in COPIED_PARTS.items():
        own = pieces.are(how)
        if pieces.sizes[own & (pieces.sizes > target)].sum() > HELD_TEXT:
            copied |= own & (parts >= least)
    return Chunks.of(pieces, parts, blocks, copied)
