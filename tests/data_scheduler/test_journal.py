import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_scheduler.journal import Event, Journal
from data_scheduler.plan import Plan
from headrace.errors import CheckpointError

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=8), plain, max_size=4), st.integers(0, 10**9))
def test_a_line_reads_back_as_the_event(data: dict, step: int) -> None:
    event = Event(3, 1.5, step, "mixture", data, "user:ada")
    assert Event.parse(event.line()) == event


def test_lines_have_the_promised_fields(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append("run_started", 0, {"a": 1}, "config")
    line = json.loads((tmp_path / "journal.jsonl").read_text())
    assert list(line) == ["seq", "time", "step", "kind", "data", "by", "crc"]


def test_a_torn_last_line_is_cut_off_and_writing_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    for step in range(3):
        journal.append("mixture", step, {"weights": {"a": 1.0}}, "config")
    whole = path.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    for cut in range(1, last + 1):
        path.write_bytes(whole[:-cut])
        again = Journal(path)
        assert [event.step for event in again.events] == [0, 1]
        again.append("mixture", 9, {}, "config")
        assert [event.step for event in Journal(path).events] == [0, 1, 9]


def test_damage_in_the_middle_is_an_error_that_says_where(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    for step in range(4):
        journal.append("mixture", step, {"weights": {"a": 0.5}}, "config")
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b"0.5", b"0.6")  # a flipped digit: still JSON, wrong checksum
    path.write_bytes(b"".join(lines))
    with pytest.raises(CheckpointError, match=r"journal.jsonl:2: damaged journal \(checksum"):
        Journal(path)


def test_a_missing_line_is_damage_too(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    for step in range(4):
        journal.append("mixture", step, {}, "config")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:1] + lines[2:]))
    with pytest.raises(CheckpointError, match="event 2 where 1 belongs"):
        Journal(path)


def test_only_the_writer_touches_the_file(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path).append("run_started", 0, {}, "config")
    before = path.read_bytes()
    reader = Journal(path, writable=False)
    reader.append("mixture", 0, {"weights": {}}, "config")
    assert path.read_bytes() == before
    assert len(reader.events) == 2


def test_resuming_takes_back_the_policys_later_decisions_but_not_a_persons() -> None:
    journal = Journal()
    for step, by in ((0, "policy:x"), (5, "policy:x"), (8, "user:ada"), (9, "policy:x")):
        journal.append("mixture", step, {"weights": {"a": float(step)}}, by)
    plan = Plan(journal)
    assert [plan.mixture.at(step)["a"] for step in (0, 4, 5, 8, 9)] == [0.0, 0.0, 5.0, 8.0, 9.0]
    plan.apply(journal.append("resumed", 5, {}, "system"))
    assert [plan.mixture.at(step)["a"] for step in (0, 5, 7, 8, 9)] == [0.0, 0.0, 0.0, 8.0, 8.0]
