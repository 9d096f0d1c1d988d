"""Timelines against a plain model of what they promise: history never changes, undoing is from a step on."""

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_scheduler.timeline import Entry, MixtureTimeline, Timeline

STEPS = 30
entries = st.lists(st.tuples(st.integers(0, STEPS), st.booleans()), max_size=8)
undoings = st.lists(st.tuples(st.integers(0, 7), st.integers(0, STEPS)), max_size=4)


@given(entries, undoings)
def test_the_newest_entry_that_is_not_undone_holds(made: list[tuple[int, bool]], undone: list[tuple[int, int]]) -> None:
    timeline = Timeline()
    for order, (step, person) in enumerate(made):
        timeline.put(Entry(step, order, order, "user:x" if person else "policy:y", str(order)))
    for command, step in undone:
        timeline.undo(str(command), step)
    over = {command: min(at for known, at in undone if known == command) for command, _ in undone}
    for step in range(STEPS + 1):
        holding = [
            (begin, order)
            for order, (begin, _) in enumerate(made)
            if begin <= step and step < over.get(order, STEPS + 2)
        ]
        assert timeline.at(step) == (max(holding)[1] if holding else None)


@given(
    st.lists(st.tuples(st.integers(0, STEPS), st.booleans(), st.integers(0, 6), st.integers(0, 3)), max_size=6),
    undoings,
    st.lists(st.tuples(st.integers(0, STEPS), st.integers(0, STEPS), st.integers(0, STEPS)), max_size=2),
)
def test_until_it_says_so_nothing_changes(
    made: list[tuple[int, bool, int, int]], undone: list[tuple[int, int]], voided: list[tuple[int, int, int]]
) -> None:
    timeline = MixtureTimeline()
    for order, (step, person, over, value) in enumerate(made):
        entry = Entry(step, order, {"a": float(value)}, "user:x" if person else "policy:y", str(order), over)
        timeline.put(entry)
    for command, step in undone:
        timeline.undo(str(command), step)
    for void in voided:
        timeline.void(*void)
    for step in range(STEPS):
        until = timeline.steady_until(step)
        assert until > step
        for later in range(step, int(min(until, STEPS + 9))):
            assert timeline.at(later) == timeline.at(step)
            assert timeline.newest(later) == timeline.newest(step)


def ramp(step: int, order: int, value: Mapping[str, float], over: int = 0) -> Entry:
    return Entry(step, order, value, "user:x", str(order), over)


def test_a_ramp_takes_equal_steps_and_begins_where_the_mixture_stood() -> None:
    mixture = MixtureTimeline()
    mixture.put(ramp(0, 0, {"a": 1.0, "b": 0.0}))
    mixture.put(ramp(10, 1, {"b": 1.0}, over=4))
    found = [(mixture.at(step) or {}) for step in range(9, 15)]
    assert [weights.get("a", 0.0) for weights in found] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert [weights["b"] for weights in found] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert mixture.turns() == [0, 10, 13]
    assert mixture.turns(12) == [0, 10, 11]
    mixture.put(ramp(20, 2, {"a": 1.0}, over=10**9))
    assert mixture.turns() == [0, 10, 13, 20, 20 + 10**9 - 1]


def test_a_ramp_inside_a_ramp_begins_at_what_held_and_undoing_goes_back_to_the_first() -> None:
    mixture = MixtureTimeline()
    mixture.put(ramp(0, 0, {"a": 1.0}))
    mixture.put(ramp(10, 1, {"a": 0.0}, over=10))
    mixture.put(ramp(15, 2, {"a": 0.5}, over=5))
    before = [(mixture.at(step) or {})["a"] for step in range(20)]
    assert before[14] == 0.5
    assert before[15:] == pytest.approx([0.5] * 5)
    mixture.undo("2", 17)
    after = [(mixture.at(step) or {})["a"] for step in range(21)]
    assert after[:17] == before[:17]
    assert after[17:] == pytest.approx([0.2, 0.1, 0.0, 0.0])


def test_a_thousand_overlapping_ramps_are_no_trouble() -> None:
    mixture = MixtureTimeline()
    for number in range(3000):
        mixture.put(ramp(number, number, {"a": 1.0, "b": float(number)}, over=5000))
    assert set(mixture.at(2999) or {}) == {"a", "b"}


def test_resuming_takes_back_what_no_person_decided() -> None:
    timeline = Timeline()
    for order, (step, by) in enumerate(((0, "policy:x"), (5, "user:ada"), (6, "policy:x"), (9, "user:ada"))):
        timeline.put(Entry(step, order, step, by))
    timeline.take_back(5)
    assert [timeline.at(step) for step in (0, 5, 6, 9)] == [0, 5, 5, 9]
