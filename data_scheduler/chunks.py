"""What is dealt to lanes: chunks, cut from a source's files by a rule that needs only the journaled manifest.

A chunk is a unit of a file (see `reading`), or one of several parts of a unit:

| unit | part p of n | why |
| --- | --- | --- |
| bytes of a plain `.jsonl` | cut by bytes, not into parts | can be read from anywhere |
| compressed `.jsonl` | the lines that begin in blocks p, p+n, p+2n, … of its text | a stream can be cut without knowing its length, and a wrong guess of it makes all parts larger or smaller alike |
| row group, record batch, stretch of documents | rows [R·p/n, R·(p+1)/n) of R | R is known; ranges can be copied in one pass |
| anything else | records p, p+n, p+2n, … | needs nothing but the records |
"""  # noqa: E501

import itertools
from typing import NamedTuple

from data_scheduler.formats.records import Unit

TEXT_PER_COMPRESSED_BYTE = 4
"""Guess of the text behind a compressed byte (3.2 to 4.6 on English and code at common levels)."""
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


class Piece(NamedTuple):
    """A unit that is about to be cut."""

    unit: Unit
    size: int
    """Bytes of text."""
    cut: str
    """`bytes`, `lines` (blocks of a stream), `rows`, `documents` (rows that are found without reading), `records`."""


def chunk_target(pieces: list[Piece], chunk_bytes: int, lanes: int) -> int:
    """Bytes of text in a chunk: `chunk_bytes`, less where the source could not give every lane two such."""
    return max(MIN_CHUNK_BYTES, min(chunk_bytes, sum(piece.size for piece in pieces) // (2 * lanes)))


def cut_pieces(pieces: list[Piece], chunk_bytes: int, lanes: int) -> list[Chunk]:
    """All chunks of a source, in file order; a pure function of the arguments."""
    target = chunk_target(pieces, chunk_bytes, lanes)
    # A power of two, so that files that join a source seldom change the blocks of those that were there.
    block = 1 << ((target // BLOCKS_PER_PART).bit_length() - 1)
    cut = dict.fromkeys(COPIED_PARTS, 0)
    for _, size, how in pieces:
        if how in cut and size > target:
            cut[how] += size
    chunks: list[Chunk] = []
    for unit, size, how in pieces:
        parts = max(1, -(-size // target))
        if how == "bytes":
            edges = [size * part // parts for part in range(parts + 1)]
            chunks += [Chunk(Unit(unit.path, a, b), 0, 1, b - a) for a, b in itertools.pairwise(edges)]
            continue
        copied = how in cut and cut[how] > HELD_TEXT and parts >= COPIED_PARTS[how]
        own_block = block if how == "lines" and parts > 1 else 0
        chunks += [Chunk(unit, part, parts, size // parts, own_block, copied) for part in range(parts)]
    return chunks
