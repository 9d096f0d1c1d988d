"""Cutting: nothing lost, parts alike, and only large units of large sources are copied."""

import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_scheduler.chunks import BLOCKS_PER_PART, COPIED_PARTS, HELD_TEXT, MIN_CHUNK_BYTES, Chunk, Chunks, cut_pieces
from data_scheduler.config import SourceConfig
from data_scheduler.formats.records import Unit
from data_scheduler.manifest import Manifest
from data_scheduler.paths import file_kind
from data_scheduler.pieces import CUTS, TEXT_PER_COMPRESSED_BYTE, Piece, Pieces
from data_scheduler.reading import TOKEN_KINDS, layout_units

ENDINGS = (
    ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow", ".csv", ".csv.xz", ".txt", ".ds", ".bin", ".npy",
    ".wet.gz",
)  # fmt: skip
pieces = st.lists(
    st.tuples(st.integers(1, 50_000_000), st.sampled_from(["bytes", "lines", "rows", "documents", "records"])),
    max_size=6,
)


def table(found: list[Piece]) -> Pieces:
    """Pieces as the columns that `cut_pieces` takes."""
    return Pieces(
        [(piece.unit.path, 0) for piece in found],
        np.arange(len(found), dtype=np.int32),
        np.array([piece.unit.start for piece in found], np.int64),
        np.array([piece.unit.stop for piece in found], np.int64),
        np.array([piece.size for piece in found], np.int64),
        np.array([CUTS.index(piece.cut) for piece in found], np.int8),
    )


def plainly_cut(found: list[Piece], chunk_bytes: int, lanes: int) -> list[Chunk]:
    """The rule in plain words, a chunk at a time; `cut_pieces` must give the same."""
    target = max(MIN_CHUNK_BYTES, min(chunk_bytes, sum(piece.size for piece in found) // (2 * lanes)))
    block = 1 << ((target // BLOCKS_PER_PART).bit_length() - 1)
    cut = dict.fromkeys(COPIED_PARTS, 0)
    for _, size, how in found:
        if how in cut and size > target:
            cut[how] += size
    chunks: list[Chunk] = []
    for unit, size, how in found:
        parts = max(1, -(-size // target))
        if how == "bytes":
            edges = [size * part // parts for part in range(parts + 1)]
            chunks += [Chunk(Unit(unit.path, a, b), 0, 1, b - a) for a, b in itertools.pairwise(edges)]
            continue
        copied = how in cut and cut[how] > HELD_TEXT and parts >= COPIED_PARTS[how]
        own_block = block if how == "lines" and parts > 1 else 0
        chunks += [Chunk(unit, part, parts, size // parts, own_block, copied) for part in range(parts)]
    return chunks


def plain_pieces(manifest: Manifest, format: str) -> list[Piece]:
    """What `Manifest.pieces` must give, a file at a time."""
    found = []
    for path, size in manifest.files:
        if size == 0:
            continue
        kind, compression = file_kind(path, format)
        if path in manifest.row_groups:
            layout = manifest.row_groups[path]
            how = "documents" if kind in TOKEN_KINDS else "rows"
            units = layout_units(path, format, layout)
            found += [Piece(unit, max(1, text), how) for unit, (_, text) in zip(units, layout, strict=True)]
            continue
        how = "records" if kind != "jsonl" else "bytes" if compression is None else "lines"
        found.append(Piece(Unit(path, 0, -1), size * (TEXT_PER_COMPRESSED_BYTE if compression else 1), how))
    return found


def mixed(count: int, state: int) -> Manifest:
    """A manifest of all kinds of files, with numbers from a recurrence that no library can change."""

    def drawn(below: int) -> int:
        nonlocal state
        state = (state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        return (state >> 33) % below

    files, layouts = [], {}
    for number in range(count):
        path = f"/corpus/{number // 100:02d}/part-{number:05d}{ENDINGS[drawn(len(ENDINGS))]}"
        size = [0, 1, 900, 10**6, 10**7, 10**8 + number][drawn(6)]
        files.append((path, size))
        if path.endswith((".parquet", ".arrow", ".ds", ".bin")) and size:
            layouts[path] = [(drawn(1000), [0, 500, 10**6, 10**8][drawn(4)]) for _ in range(drawn(6))]
    return Manifest("mixed", files, layouts)


def test_chunks_are_fixed_for_all_time() -> None:
    # Written down, not computed: where a run of last year stands is counted in these chunks.
    config = SourceConfig.model_validate({"name": "mixed", "paths": ["/corpus"]})
    digest = hashlib.sha256()
    for count, seed in ((1, 3), (20, 1), (60, 2)):
        for chunk_bytes, lanes in ((4 << 20, 240), (1 << 20, 7)):
            for chunk in mixed(count, seed).chunks(config, chunk_bytes, lanes):
                digest.update(repr(tuple(chunk)).encode())
    assert digest.hexdigest() == "0c03ccc966850344fa945880ea550b397031d1e709b26eb101076325c072290e"


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 40), st.integers(0, 1 << 32), st.integers(18, 24), st.integers(1, 300))
def test_columns_hold_what_the_plain_rule_gives(count: int, seed: int, bits: int, lanes: int) -> None:
    config = SourceConfig.model_validate({"name": "mixed", "paths": ["/corpus"]})
    manifest, more = mixed(count, seed), mixed(count // 2, seed + 1)
    assert list(manifest.pieces(config)) == plain_pieces(manifest, "auto")
    plain = [plainly_cut(plain_pieces(each, "auto"), 1 << bits, lanes) for each in (manifest, more)]
    found = [each.chunks(config, 1 << bits, lanes) for each in (manifest, more)]
    assert list(found[0]) == plain[0]
    assert found[0].sizes().tolist() == [chunk.size for chunk in plain[0]]
    both = Chunks.joined(found)
    assert list(both) == plain[0] + plain[1]
    assert both.sizes().tolist() == [chunk.size for chunk in plain[0] + plain[1]]
    for at in (-1, len(both)):
        with pytest.raises(IndexError):
            both[at]


@settings(deadline=None)
@given(pieces, st.integers(1024, 8 << 20), st.integers(1, 300))
def test_chunks_cover_every_unit(found: list[tuple[int, str]], chunk_bytes: int, lanes: int) -> None:
    own = [Piece(Unit(str(number), 0, -1), size, how) for number, (size, how) in enumerate(found)]
    chunks = list(cut_pieces(table(own), chunk_bytes, lanes))
    assert chunks == plainly_cut(own, chunk_bytes, lanes)
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
        return [chunk.copied for chunk in cut_pieces(table(own), 4 << 20, 240) if chunk.part == 0]

    assert copied([HELD_TEXT - 1], "lines") == [False]  # fits into memory
    assert copied([3 << 30], "lines") == [True]
    assert copied([3 << 30, 8 << 20, 9 << 20, 1 << 20], "lines") == [True, False, True, False]
    assert copied([3 << 30, 32 << 20, 40 << 20], "rows") == [True, False, True]
    assert copied([3 << 30], "records") == copied([3 << 30], "documents") == [False]


def test_blocks_do_not_change_when_a_source_grows_a_little() -> None:
    def block(sizes: list[int]) -> int:
        own = [Piece(Unit(str(number), 0, -1), size, "lines") for number, size in enumerate(sizes)]
        return max(chunk.block for chunk in cut_pieces(table(own), 4 << 20, 240))

    assert block([3 << 30]) == block([30 << 30]) == 1 << 20
    assert block([500 << 20]) == block([500 << 20, 5 << 20]) == 1 << 18


def test_rows_of_a_part() -> None:
    chunk = Chunk(Unit("x", 0, 1), 2, 3, 10)
    assert chunk.rows(10) == range(6, 10)
    assert Chunk(Unit("x", 0, 1), 0, 3, 10).rows(2) == range(0)
