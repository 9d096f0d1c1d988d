"""A stream of text cut into blocks of lines, without knowing where it ends.

Block k of size S is the lines that begin in bytes [k·S, (k+1)·S) of the text, each to its end. Every line is in exactly
one block, so any set of blocks can be read without the others. With S = 8:

    text     a b ⏎ c d e f g h i j k l ⏎ m ⏎ n o
    byte     0     3           8         14  16
    block 0  "ab⏎" and "cdefghijkl⏎", which begin in bytes 0-7; block 1 "m⏎", which begins at 14; block 2 "no"

A block in which no line begins is left out.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from data_scheduler.formats.compression import Damage


class Block(NamedTuple):
    """One block of a file's text, or one part of a row group."""

    number: int
    data: bytes
    problem: str | None = None
    """What is wrong with the stream after these lines; only the last block can have it."""


def cut(pieces: Iterable[bytes], size: int, longest: int) -> Iterator[Block]:
    """The blocks of a stream, in order, in memory for one block and one line.

    Of a line longer than `longest` bytes (and than a block) that many and one more are kept, so that a reader can tell.
    Where the stream raises Damage, the line that it fell into is dropped and its block says why.
    """
    longest = max(longest, size) + 1
    pending = bytearray()  # begins at a line's first byte, `base` bytes into the text
    base = searched = dropped = 0
    problem = None
    try:
        for piece in pieces:
            if dropped:
                # The line being dropped is longer than a block, so its end is where the block is cut.
                end = piece.find(b"\n")
                if end < 0:
                    dropped += len(piece)
                    continue
                dropped, piece = dropped + end, piece[end:]
            pending += piece
            while True:
                number = base // size
                # The first newline from the block's last byte on ends the last line that begins in the block.
                end = pending.find(b"\n", max((number + 1) * size - 1 - base, searched))
                if end < 0:
                    break
                yield Block(number, bytes(pending[: end + 1]))
                del pending[: end + 1]
                base, searched, dropped = base + end + 1 + dropped, 0, 0
            searched = len(pending)
            if searched > longest:
                kept = pending.rfind(b"\n") + 1 + longest
                if searched > kept:
                    dropped += searched - kept
                    del pending[kept:]
                    searched = kept
    except Damage as damage:
        problem = str(damage)
    if problem is not None:
        yield Block(base // size, bytes(pending[: pending.rfind(b"\n") + 1]), problem)
    elif pending:
        yield Block(base // size, bytes(pending))
