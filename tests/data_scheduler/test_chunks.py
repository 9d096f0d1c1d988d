"""Cutting: nothing lost, parts alike, and only large units of large sources are copied."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from data_scheduler.chunks import HELD_TEXT, Chunk, Piece, cut_pieces
from data_scheduler.formats.records import Unit

pieces = st.lists(
    st.tuples(st.integers(1, 50_000_000), st.sampled_from(["bytes", "lines", "rows", "documents", "records"])),
    max_size=6,
)


@settings(deadline=None)
@given(pieces, st.integers(1024, 8 << 20), st.integers(1, 300))
def test_chunks_cover_every_unit(found: list[tuple[int, str]], chunk_bytes: int, lanes: int) -> None:
    own = [Piece(Unit(str(number), 0, -1), size, how) for number, (size, how) in enumerate(found)]
    chunks = cut_pieces(own, chunk_bytes, lanes)
    assert chunks == cut_pieces(own, chunk_bytes, lanes)
    for piece in own:
        parts = [chunk for chunk in chunks if chunk.unit.path == piece.unit.path]
        assert max(part.size for part in parts) <= max(1024, chunk_bytes)
        if piece.cut == "bytes":
            assert [(part.part, part.parts, part.block) for part in parts] == [(0, 1, 0)] * len(parts)
            assert parts[0].unit.start == 0
            assert parts[-1].unit.stop == piece.size
            assert all(a.unit.stop == b.unit.start for a, b in itertools.pairwise(parts))
            continue
        assert [(part.unit, part.part, part.parts) for part in parts] == [
            (piece.unit, number, len(parts)) for number in range(len(parts))
        ]
        assert len({(part.block, part.copied) for part in parts}) == 1
        assert bool(parts[0].block) == (piece.cut == "lines" and len(parts) > 1)
        assert piece.cut in ("lines", "rows") or not parts[0].copied
        rows = [row for part in parts for row in part.rows(1000)]
        assert rows == list(range(1000))


def test_what_is_copied() -> None:
    def copied(sizes: list[int], how: str) -> list[bool]:
        own = [Piece(Unit(str(number), 0, -1), size, how) for number, size in enumerate(sizes)]
        return [chunk.copied for chunk in cut_pieces(own, 4 << 20, 240) if chunk.part == 0]

    assert copied([HELD_TEXT - 1], "lines") == [False]  # fits into memory
    assert copied([3 << 30], "lines") == [True]
    assert copied([3 << 30, 8 << 20, 9 << 20, 1 << 20], "lines") == [True, False, True, False]
    assert copied([3 << 30, 32 << 20, 40 << 20], "rows") == [True, False, True]
    assert copied([3 << 30], "records") == copied([3 << 30], "documents") == [False]


def test_blocks_do_not_change_when_a_source_grows_a_little() -> None:
    def block(sizes: list[int]) -> int:
        own = [Piece(Unit(str(number), 0, -1), size, "lines") for number, size in enumerate(sizes)]
        return max(chunk.block for chunk in cut_pieces(own, 4 << 20, 240))

    assert block([3 << 30]) == block([30 << 30]) == 1 << 20
    assert block([500 << 20]) == block([500 << 20, 5 << 20]) == 1 << 18


def test_rows_of_a_part() -> None:
    chunk = Chunk(Unit("x", 0, 1), 2, 3, 10)
    assert chunk.rows(10) == range(6, 10)
    assert Chunk(Unit("x", 0, 1), 0, 3, 10).rows(2) == range(0)
