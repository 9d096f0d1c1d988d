"""Every line is in exactly one block, whatever the pieces a stream comes in."""

import bz2
import gzip
import io
import itertools
import lzma
import tracemalloc
from collections.abc import Callable

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_scheduler.blocks import Block, cut
from data_scheduler.formats import compression
from data_scheduler.formats.compression import CODECS, decoded

PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
lines = st.lists(
    st.tuples(st.integers(0, 40), st.sampled_from([b"\n", b"\r\n", b"\n\n", b" \n"])).map(
        lambda line: bytes(range(65, 65 + line[0])) + line[1]
    ),
    max_size=40,
)


def blocks_of(packed: bytes, suffix: str, size: int) -> list[Block]:
    return list(cut(decoded(io.BytesIO(packed), CODECS[suffix]), size, 1 << 30))


def expected(text: bytes, size: int) -> list[tuple[int, bytes]]:
    """The definition, line by line."""
    found: dict[int, bytes] = {}
    at = 0
    *whole, last = text.split(b"\n")
    for line in [*(line + b"\n" for line in whole), last]:
        if not line:
            break
        found[at // size] = found.get(at // size, b"") + line
        at += len(line)
    return sorted(found.items())


@pytest.mark.parametrize("suffix", PACK)
@settings(deadline=None, max_examples=60)
@given(lines, st.booleans(), st.integers(1, 200), st.lists(st.integers(0, 1600), max_size=3), st.integers(1, 50))
def test_blocks_are_their_definition(
    suffix: str, lines: list[bytes], newline: bool, size: int, cuts: list[int], feed: int
) -> None:
    text = b"".join(lines)
    text = text if newline else text.rstrip(b"\r\n ")
    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    members = [PACK[suffix](text[a:b]) for a, b in itertools.pairwise(edges)] or [PACK[suffix](b"")]
    before, compression.FEED_BYTES = compression.FEED_BYTES, feed
    try:
        found = blocks_of(b"".join(members), suffix, size)
    finally:
        compression.FEED_BYTES = before
    assert [(number, data) for number, data, _ in found] == expected(text, size)
    assert all(problem is None for _, _, problem in found)


@pytest.mark.parametrize("suffix", PACK)
def test_zeros_between_members_are_padding(suffix: str) -> None:
    packed = PACK[suffix](b"one\n") + bytes(70_000) + PACK[suffix](b"two\n") + bytes(3)
    assert blocks_of(packed, suffix, 4) == [Block(0, b"one\n"), Block(1, b"two\n")]


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("size", [64, 1000, 1 << 20])
def test_damage_is_in_the_block_of_the_line_it_fell_into(suffix: str, size: int) -> None:
    text = b"".join(b"%d %s\n" % (number, b"x" * (number % 90)) for number in range(40_000))
    packed = PACK[suffix](text)
    whole = blocks_of(packed, suffix, size)
    half = len(packed) // 2
    overwritten = packed[:half] + bytes(40) + packed[half + 40 :]
    # gzip has its checksum at the end only: what zeros in the middle decode to cannot be told from text.
    for damaged in [packed[:half]] if suffix == ".gz" else [packed[:half], overwritten]:
        found = blocks_of(damaged, suffix, size)
        *good, last = found
        assert good == whole[: len(good)]
        assert [block.problem for block in good] == [None] * len(good)
        assert last.problem is not None
        at = sum(len(block.data) for block in found)  # where the lost line begins
        assert text[:at] == b"".join(block.data for block in found)
        assert last.number == at // size
        assert at == 0 or text[at - 1] == 10


@given(
    st.lists(st.binary(max_size=30).map(lambda line: line.replace(b"\n", b"")), max_size=20),
    st.integers(1, 64),
    st.integers(1, 40),
    st.integers(1, 10),
)
def test_long_lines_are_cut_short_where_a_reader_still_sees_it(
    lines: list[bytes], size: int, longest: int, piece: int
) -> None:
    text = b"".join(line + b"\n" for line in lines)
    pieces = [text[at : at + piece] for at in range(0, len(text), piece)]
    found = list(cut(iter(pieces), size, longest))
    whole = list(cut(iter(pieces), size, 1 << 30))
    assert [block.number for block in found] == [block.number for block in whole]
    for short, full in zip(found, whole, strict=True):
        for kept, line in zip(short.data.split(b"\n"), full.data.split(b"\n"), strict=True):
            assert line.startswith(kept)
            assert kept == line or len(kept) > max(longest, size)
            assert len(kept) <= max(longest, size) + 1 + piece


def test_memory_is_bounded_by_the_longest_line_that_is_kept() -> None:
    endless = itertools.chain([b"a\n"], itertools.repeat(b"x" * 1000, 20_000), [b"\nb\n"])
    tracemalloc.start()
    found = list(cut(endless, 16, 5000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(block.number, len(block.data)) for block in found] == [(0, 2 + 5001 + 1), (20_000_003 // 16, 2)]
    assert peak < 100_000


def test_a_line_begins_in_one_block() -> None:
    """The example of the module, and a line that begins right at a block's first byte."""
    text = b"ab\ncdefghijkl\nm\nno"
    assert list(cut(iter([text]), 8, 100)) == [Block(0, b"ab\ncdefghijkl\n"), Block(1, b"m\n"), Block(2, b"no")]
    assert list(cut(iter([b"abc\nde\n"]), 4, 100)) == [Block(0, b"abc\n"), Block(1, b"de\n")]
    assert list(cut(iter([b"abcd\ne\n"]), 4, 100)) == [Block(0, b"abcd\n"), Block(1, b"e\n")]
