"""The compiled inner loops give what their definitions in numpy give, and refuse what does not fit."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_scheduler import native as native_module
from data_scheduler import sequences
from data_scheduler.state import PLACE

native = pytest.mark.skipif(not sequences.NATIVE, reason="the loops of csrc/loader/ are not compiled here")


def same(one: Any, other: Any) -> None:
    for a, b in zip(one, other, strict=True):
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype
            assert a.tolist() == b.tolist()
        else:
            assert a == b


@st.composite
def stretches(draw: st.DrawFn) -> dict[str, Any]:
    """Documents of 0 to 9 tokens, not all of 0; and a part of their tokens."""
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any))
    dtype = draw(st.sampled_from([np.uint16, np.uint32]))
    total = sum(lengths)
    begins = np.cumsum([0, *lengths[:-1]])
    at = draw(st.integers(0, total - 1))
    count = draw(st.integers(1, total - at))
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    return {
        "tokens": rng.integers(0, np.iinfo(dtype).max, total, dtype=dtype, endpoint=True),
        "begins": begins,
        "ids": rng.integers(0, 1 << 60, len(lengths)),
        "offsets": rng.integers(0, 1 << 40, len(lengths)),
        "at": at,
        "place": int(np.searchsorted(begins, at, side="right")) - 1,
        "out": np.zeros(count, draw(st.sampled_from([np.int64, dtype]))),
    }


@native
@given(stretches())
def test_cut_is_its_definition(given: dict[str, Any]) -> None:
    expected = sequences.cut_in_numpy(**given)
    filled, given["out"] = given["out"], np.zeros_like(given["out"])
    same(sequences.cut(**given), expected)
    assert given["out"].tolist() == filled.tolist() == given["tokens"][given["at"] :][: len(filled)].tolist()


@pytest.mark.parametrize("cut", [sequences.cut, sequences.cut_in_numpy])
@given(stretches())
def test_cuts_one_after_the_other_are_the_whole(cut: Any, given: dict[str, Any]) -> None:
    """Cut into sequences of `count` tokens from the beginning on, every token is of the document that it is of."""
    tokens, begins, ids, offsets = (given[name] for name in ("tokens", "begins", "ids", "offsets"))
    lengths = np.diff([*begins, len(tokens)])
    owner = np.repeat(ids, lengths)
    inside = np.concatenate([np.arange(length) + first for length, first in zip(lengths, offsets, strict=True)])
    at, place, size = 0, int(np.searchsorted(begins, 0, side="right")) - 1, len(given["out"])
    while at < len(tokens):
        out = np.zeros(min(size, len(tokens) - at), np.int64)
        starts, own, first, place, token = cut(tokens, begins, ids, offsets, at, place, out)
        assert starts[0] == 0
        spans = np.diff([*starts, len(out)])
        assert (spans > 0).all()
        assert np.repeat(own, spans).tolist() == owner[at : at + len(out)].tolist()
        within = np.concatenate([np.arange(span) + token for span, token in zip(spans, first, strict=True)])
        assert within.tolist() == inside[at : at + len(out)].tolist()
        at += len(out)
        if at < len(tokens):
            assert token == inside[at]


@native
@given(stretches(), st.integers(-3, 60), st.integers(-2, 14), st.integers(0, 60))
def test_cut_outside_is_refused(given: dict[str, Any], at: int, place: int, size: int) -> None:
    """Whatever the numbers, both do the same or both refuse."""
    asked = given | {"at": at, "place": place, "out": np.zeros(size, np.int64)}
    try:
        expected = sequences.cut_in_numpy(**asked)
    except ValueError:
        with pytest.raises(ValueError, match="outside"):
            sequences.cut(**asked)
    else:
        same(sequences.cut(**asked), expected)


@native
def test_wrong_types_are_refused() -> None:
    good = {"tokens": np.zeros(4, np.uint16), "at": 0, "place": 0, "out": np.zeros(2, np.int64)}
    good |= {name: np.zeros(1, np.int64) for name in ("begins", "ids", "offsets")}
    sequences.cut(**good)
    for name, wrong in [
        ("begins", np.zeros(1, np.int32)),
        ("tokens", np.zeros(4, np.uint8)),
        ("tokens", np.zeros(8, np.uint16)[::2]),
        ("out", [0, 0]),
        ("at", "0"),
    ]:
        with pytest.raises((TypeError, ValueError, BufferError)):
            sequences.cut(**(good | {name: wrong}))
    frozen = np.zeros(2, np.int64)
    frozen.setflags(write=False)
    with pytest.raises((ValueError, BufferError)):
        sequences.cut(**(good | {"out": frozen}))


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[Any], list[Any], int]:
    width = draw(st.integers(2, 12))
    starts, ids = [], []
    for _ in range(draw(st.integers(1, 4))):
        inside = draw(st.sets(st.integers(1, width - 1)))
        starts.append(np.array(sorted({0} | inside), np.int32))
        ids.append(np.array(draw(st.lists(st.integers(0, 99), min_size=len(starts[-1]), max_size=len(starts[-1])))))
    return starts, ids, width


@native
@given(rows())
def test_layout_is_its_definition(given: tuple[list[Any], list[Any], int]) -> None:
    same(sequences.layout(*given), sequences.layout_in_numpy(*given))


@given(rows())
def test_positions_and_mask_of_every_token(given: tuple[list[Any], list[Any], int]) -> None:
    starts, ids, width = given
    edges, documents, positions, mask = sequences.layout(*given)
    flat = []
    for row, (begins, own) in enumerate(zip(starts, ids, strict=True)):
        for token in range(width - 1):
            place = int(np.searchsorted(begins, token, side="right")) - 1
            assert positions[row, token] == token - begins[place]
            assert mask[row, token] == (token + 1 not in begins.tolist())
            if token == begins[place]:
                flat.append((row * (width - 1) + token, own[place]))
    assert list(zip(edges.tolist(), documents.tolist(), strict=False)) == flat
    assert edges[-1] == len(starts) * (width - 1)


@pytest.mark.parametrize("layout", [sequences.layout, sequences.layout_in_numpy])
@pytest.mark.parametrize("starts", [[], [1], [0, 0], [0, 3, 2], [0, 4], [0, -1]])
def test_starts_that_do_not_ascend_are_refused(layout: Any, starts: list[int]) -> None:
    good, bad = np.array([0, 2], np.int32), np.array(starts, np.int32)
    with pytest.raises(ValueError, match="row 1"):
        layout([good, bad], [np.zeros(2, np.int64), np.zeros(len(bad), np.int64)], 4)


@native
@given(st.lists(st.integers(-6, 5), max_size=9), st.integers(1, 99), st.integers(0, 9))
def test_count_is_its_definition(places: list[int], width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    positions = rng.integers(0, 99, (6, PLACE)).astype(np.int32)
    given = rng.integers(0, 99, (6, 2))
    new = rng.integers(0, 99, (len(places), PLACE)).astype(np.int32)
    found = []
    for count in (sequences.count, sequences.count_in_numpy):
        own = positions.copy(), given.copy()
        count(np.array(places, np.int64), new, *own, width)
        found.append(own)
    same(*found)


@pytest.mark.parametrize("count", [sequences.count, sequences.count_in_numpy])
def test_a_place_that_is_not_there_is_refused(count: Any) -> None:
    positions, given = np.zeros((6, PLACE), np.int32), np.zeros((6, 2), np.int64)
    for place in (6, ~6, 1 << 40, -(1 << 40)):
        with pytest.raises(ValueError, match="count"):
            count(np.array([place]), np.zeros((1, PLACE), np.int32), positions, given, 9)


@st.composite
def documents(draw: st.DrawFn) -> tuple[list[Any], Any, Any, Any]:
    dtype = draw(st.sampled_from([np.uint16, np.uint32]))
    lengths = draw(st.lists(st.integers(0, 7), max_size=6))
    edge = [np.array(draw(st.lists(st.integers(0, 9), max_size=1)), np.uint32) for _ in range(2)]
    rows = [
        np.array(draw(st.lists(st.integers(0, np.iinfo(dtype).max), min_size=length, max_size=length)), kind)
        for length in lengths
        for kind in [draw(st.sampled_from([dtype, np.uint32]))]
    ]
    return rows, *edge, dtype


@native
@given(documents())
def test_join_is_its_definition(given: tuple[list[Any], Any, Any, Any]) -> None:
    same(sequences.join(*given), sequences.join_in_numpy(*given))


@pytest.mark.parametrize("join", [sequences.join, sequences.join_in_numpy])
@given(given=documents())
def test_joined_documents_stand_where_it_says(join: Any, given: tuple[list[Any], Any, Any, Any]) -> None:
    rows, before, after, dtype = given
    tokens, begins = join(*given)
    assert tokens.dtype == dtype
    found = np.split(tokens, begins[1:]) if rows else []
    assert [part.tolist() for part in found] == [[*before, *row, *after] for row in rows]


@native
def test_rows_that_are_no_tokens_are_refused() -> None:
    none = np.zeros(0, np.uint32)
    for row in (np.zeros(3, np.int64), np.zeros(3, np.uint8), np.zeros(6, np.uint16)[::2], [1, 2]):
        with pytest.raises((TypeError, ValueError, BufferError)):
            sequences.join([none, row], none, none, np.uint16)


def test_loops_compiled_from_other_sources_are_left_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_module, "import_module", lambda name: SimpleNamespace(VERSION=native_module.VERSION))
    assert native_module._compiled() is not None
    monkeypatch.setattr(native_module, "import_module", lambda name: SimpleNamespace())
    assert native_module._compiled() is None
