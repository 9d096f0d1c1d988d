"""Guard-rails: all bounds at once, freezes, dry runs; whatever the policy inside wants."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data_scheduler import DataConfig
from data_scheduler.config import GuardConfig, share_bounds
from data_scheduler.mixture import ONE, quantize
from data_scheduler.policies import Feedback, make_policy
from data_scheduler.policies.context import Context
from data_scheduler.policies.guard import Guard, open_policy
from data_scheduler.policies.simplex import project

Make = Callable[..., DataConfig]


class Script:
    """Asks for the given weights, one after another, and remembers what it was told."""

    uses_feedback = True

    def __init__(self, asked: Sequence[Mapping[str, float]]) -> None:
        self._asked, self._turn = list(asked), 0
        self.heard: list[Feedback] = []

    def weights(self, step: int, feedback: Sequence[Feedback]) -> Mapping[str, float]:
        self.heard += feedback
        self._turn += 1
        return self._asked[min(self._turn, len(self._asked)) - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"turn": self._turn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._turn = int(state.get("turn", 0))


def guard(asked: Sequence[Mapping[str, float]], dry_run: bool = False, **config: Any) -> Guard:
    names = list(asked[0])
    settled = GuardConfig(**config)
    low = [math.floor(settled.min_share * ONE)] * len(names)
    high = [math.ceil(settled.max_share * ONE)] * len(names)
    return Guard(Script(asked), dict.fromkeys(names, 1.0), settled, low, high, dry_run=dry_run)


# -- projection -------------------------------------------------------------------------------------------------------

weight = st.one_of(st.just(0.0), st.floats(1e-9, 1.0))


@st.composite
def boxes(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    """(wanted, low, high) with room between the bounds, in units of 1/ONE."""
    size = draw(st.integers(1, 8))
    names = [str(number) for number in range(size)]

    def shares() -> list[int]:
        values = draw(st.lists(weight, min_size=size, max_size=size).filter(any))
        return quantize(dict(zip(names, values, strict=True)), names).tolist()

    inside, wanted = shares(), shares()  # a point that is within the bounds: there is room
    low = [draw(st.integers(0, share)) for share in inside]
    high = [draw(st.integers(share, ONE)) for share in inside]
    return wanted, low, high


@settings(deadline=None, max_examples=100)
@given(boxes())
def test_projection_is_within_all_bounds_and_nearest(box: tuple[list[int], list[int], list[int]]) -> None:
    wanted, low, high = box
    found = project(wanted, low, high)
    assert sum(found) == ONE
    assert all(least <= share <= most for least, share, most in zip(low, found, high, strict=True))
    # Nearest: no pair can trade a unit and come nearer (the conditions of optimality of a convex problem on this set).
    # A trade that takes one from i and gives it to j gains when (found_i − wanted_i) > (found_j − wanted_j) + 1.
    over = [share - asked for share, asked in zip(found, wanted, strict=True)]
    givers = [over[i] for i in range(len(found)) if found[i] > low[i]]
    takers = [over[i] for i in range(len(found)) if found[i] < high[i]]
    if givers and takers:
        assert max(givers) <= min(takers) + 1


def test_projection_by_hand() -> None:
    # (0.7, 0.2, 0.1) with at most 0.5: what is over, 0.2, goes to the others in equal parts: (0.5, 0.3, 0.2).
    tenth = ONE // 10
    found = project([ONE - 3 * tenth, 2 * tenth, tenth], [0] * 3, [ONE // 2] * 3)
    assert [share / ONE for share in found] == pytest.approx([0.5, 0.3, 0.2], abs=1e-11)


# -- bounds -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_the_output_satisfies_every_bound_at_once(data: st.DataObject) -> None:
    size = data.draw(st.integers(2, 6))
    names = [f"s{number}" for number in range(size)]
    least = data.draw(st.floats(0.0, 1 / size))
    most = data.draw(st.floats(1 / size, 1.0))
    change = data.draw(st.one_of(st.none(), st.floats(1e-6, 1.0)))
    every = data.draw(st.integers(1, 3))
    asked = data.draw(
        st.lists(
            st.lists(weight, min_size=size, max_size=size)
            .filter(any)
            .map(lambda values: dict(zip(names, values, strict=True))),
            min_size=1,
            max_size=12,
        )
    )
    made = guard(asked, min_share=least, max_share=most, max_change=change, update_every=every)
    before: Mapping[str, float] = {}
    stop = data.draw(st.integers(0, len(asked)))
    for step in range(len(asked)):
        if step == stop:  # a stop in the middle changes nothing
            state = json.loads(json.dumps(made.state_dict()))
            made = guard(asked, min_share=least, max_share=most, max_change=change, update_every=every)
            made.load_state_dict(state)
        weights = made.weights(step, [])
        shares = quantize(weights, names)
        assert (shares / ONE == [weights[name] for name in names]).all(), "shares are exact: quantizing changes nothing"
        for name, share in weights.items():
            assert least - 1 / ONE <= share <= most + 1 / ONE
            if before and change is not None:
                assert abs(share - before[name]) <= max(change, 1 / ONE)
        if before and step % every:
            assert weights == before
        before = weights


def test_a_far_target_is_reached_in_steps_though_the_policy_repeats_itself() -> None:
    made = guard([{"a": 0.5, "b": 0.5}, *[{"a": 1.0, "b": 0.0}] * 6], max_change=0.2, max_share=0.9)
    path = [made.weights(step, [])["a"] for step in range(6)]
    assert path == pytest.approx([0.5, 0.7, 0.9, 0.9, 0.9, 0.9], abs=1e-10)


def test_bounds_that_were_tightened_hold_at_once_after_a_resume() -> None:
    first = guard([{"a": 0.9, "b": 0.1}] * 3, max_change=0.05)
    first.weights(0, [])
    second = guard([{"a": 0.9, "b": 0.1}] * 3, max_change=0.05, max_share=0.6)
    second.load_state_dict(first.state_dict())
    assert second.weights(1, [])["a"] == pytest.approx(0.6)


def test_a_source_that_joins_begins_at_its_least_share() -> None:
    first = guard([{"a": 0.9, "b": 0.1}] * 2, max_change=0.01)
    first.weights(0, [])
    second = guard([{"a": 0.8, "b": 0.1, "c": 0.1}] * 3, max_change=0.01, min_share=0.05)
    second.load_state_dict(first.state_dict())
    weights = second.weights(1, [])
    assert weights["c"] == pytest.approx(0.06)
    assert sum(weights.values()) == 1


# -- freezing ---------------------------------------------------------------------------------------------------------


def told(step: int, loss: float, other: float = 2.0) -> Feedback:
    return Feedback(step, {"a": loss, "b": other}, {"a": 10, "b": 10}, {"a": 1.0})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_freezes_the_mixture_and_is_kept_from_the_policy(bad: float) -> None:
    asked = [{"a": 1.0 + turn, "b": 1.0} for turn in range(20)]
    made = guard(asked, freeze_steps=5)
    inside: Any = made._policy
    weights = [made.weights(step, [told(step - 1, bad if step == 4 else 3.0)] if step else []) for step in range(12)]
    assert all(shares == weights[3] for shares in weights[4:9])
    assert weights[9] != weights[3]
    assert weights[9]["a"] == pytest.approx(10 / 11)
    losses = {report.step: dict(report.source_loss) for report in inside.heard}
    assert losses[2] == {"a": 3.0, "b": 2.0}
    assert [losses[step] for step in range(3, 8)] == [{}] * 5
    assert losses[8] == {"a": 3.0, "b": 2.0}
    assert all(report.source_tokens == {"a": 10, "b": 10} for report in inside.heard), "tokens go on being counted"
    notes = made.take_notes()
    assert [(note.kind, note.data["until"], note.data["reported"]) for note in notes] == [("frozen", 9, 3)]
    assert notes[0].data["why"] == "loss of a is not a number"
    assert made.take_notes() == []


def test_without_freezing_a_bad_loss_is_left_out() -> None:
    made = guard([{"a": 1.0, "b": 1.0}, {"a": 2.0, "b": 1.0}], freeze_on_nan=False)
    inside: Any = made._policy
    made.weights(0, [])
    assert made.weights(1, [told(0, math.nan)])["a"] == pytest.approx(2 / 3)
    assert inside.heard[0].source_loss == {"b": 2.0}
    assert made.take_notes() == []


def test_a_spike_freezes_and_a_lasting_rise_does_not_for_ever() -> None:
    asked = [{"a": 1.0 + turn, "b": 1.0} for turn in range(400)]
    made = guard(asked, spike_factor=1.5, freeze_steps=3)
    weights = [made.weights(0, [])]
    for step in range(1, 40):
        weights.append(made.weights(step, [told(step - 1, 30.0 if step == 30 else 2.0)]))
    # The mean was 2; step 30 is told (30 + 2)/2 = 16 > 1.5 · 2.
    assert [note.data["until"] for note in made.take_notes()] == [33]
    assert weights[30] == weights[31] == weights[32] == weights[29]
    assert weights[33] != weights[29]
    frozen = 0
    for step in range(40, 400):
        weights.append(made.weights(step, [told(step - 1, 8.0, 8.0)]))
        frozen += weights[-1] == weights[-2]
    # The mean takes in at most 1.5 times itself, so it grows 1 % a step: ln(8/1.5/2)/0.01 = 98 steps.
    assert 90 <= frozen <= 105
    assert weights[-1] != weights[-2]


def test_freezes_survive_a_stop() -> None:
    asked = [{"a": 1.0 + turn, "b": 1.0} for turn in range(20)]

    def go(stop: int) -> list[Mapping[str, float]]:
        made, given = guard(asked, freeze_steps=5), []
        for step in range(12):
            if step == stop:
                state = json.loads(json.dumps(made.state_dict()))
                made = guard(asked, freeze_steps=5)
                made.load_state_dict(state)
            given.append(made.weights(step, [told(step - 1, math.nan if step == 4 else 3.0)] if step else []))
        return given

    assert go(5) == go(7) == go(10) == go(99)


# -- dry runs, configuration ------------------------------------------------------------------------------------------


def test_a_dry_run_draws_by_the_configuration_and_says_what_would_have_been() -> None:
    made = guard([{"a": 3.0, "b": 1.0}, {"a": 3.0, "b": 1.0}, {"a": 1.0, "b": 1.0}], dry_run=True, max_share=0.7)
    assert [made.weights(step, []) for step in range(3)] == [{"a": 1.0, "b": 1.0}] * 3
    notes = made.take_notes()
    assert [note.kind for note in notes] == ["proposed", "proposed"]
    assert notes[0].data["weights"] == pytest.approx({"a": 0.7, "b": 0.3})
    assert notes[1].data["weights"] == pytest.approx({"a": 0.5, "b": 0.5})


def sources(**changes: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"name": name, "paths": [name], **changes.get(name, {})} for name in "abc"]


def config(
    guard: dict[str, Any] | None = None, kind: str = "odm", dry_run: bool = False, **of: dict[str, Any]
) -> DataConfig:
    policy = {"kind": kind, "guard": guard or {}, "dry_run": dry_run}
    return DataConfig.model_validate({"tokenizer": "t", "sources": sources(**of), "policy": policy})


@pytest.mark.parametrize(
    ("guard", "of", "message"),
    [
        ({"min_share": 0.4}, {}, "least shares sum to 1.2, more than 1"),
        ({"max_share": 0.3}, {}, "largest shares sum to 0.9, less than 1"),
        ({"max_share": 0.4}, {"b": {"min_share": 0.5}}, "source b: min_share is above max_share"),
        ({"min_share": 0.2}, {"b": {"max_share": 0.1}}, "source b: min_share is above max_share"),
        ({"min_share": 0.3}, {"a": {"min_share": 0.5}}, "least shares sum to 1.1"),
    ],
)
def test_bounds_without_room_are_refused(guard: dict[str, Any], of: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(guard, **of)


def test_bounds_of_a_source_come_before_those_of_all() -> None:
    found = config({"min_share": 0.1, "max_share": 0.5}, a={"min_share": 0.3}, b={"max_share": 0.2}, c={"weight": 0.0})
    low, high = share_bounds(found)
    assert [share / ONE for share in low] == pytest.approx([0.3, 0.1, 0.0])  # c is switched off
    assert [share / ONE for share in high] == pytest.approx([0.5, 0.2, 0.5])
    config({"min_share": 1 / 3, "max_share": 1 / 3})  # thirds leave room for 1


def test_epochs_have_a_default_that_a_source_can_change() -> None:
    found = config({"max_epochs": 4}, b={"max_epochs": 1})
    assert [source.max_epochs for source in found.sources] == [4, 1, 4]
    assert DataConfig.model_validate(found.model_dump()) == found


def test_only_what_can_bind_is_wrapped() -> None:
    context = Context(("a", "b", "c"))
    assert not isinstance(open_policy(config(kind="static"), context), Guard)
    assert isinstance(open_policy(config(kind="odm"), context), Guard)
    assert isinstance(open_policy(config({"max_share": 0.5}, kind="static"), context), Guard)
    assert isinstance(open_policy(config(kind="static", dry_run=True), context), Guard)
    bounded = open_policy(config({"max_share": 0.4}, "static", a={"weight": 8.0}), context)
    assert bounded.weights(0, []) == pytest.approx({"a": 0.4, "b": 0.3, "c": 0.3})


def test_a_state_from_before_the_guard_is_taken_up() -> None:
    bare = make_policy("odm", {"warmup_steps": 0}, {"a": 1.0, "b": 1.0, "c": 1.0})
    bare.weights(1, [Feedback(0, {"a": 4.0, "b": 2.0, "c": 3.0}, shares={"a": 0.5, "b": 0.25, "c": 0.25})])
    made = open_policy(config(), Context(("a", "b", "c")))
    made.load_state_dict(json.loads(json.dumps(bare.state_dict())))
    assert made.state_dict()["policy"] == bare.state_dict()


def test_another_policy_begins_anew_from_the_shares_in_force() -> None:
    first = open_policy(config({"max_change": 0.1}, kind="odm"), Context(("a", "b", "c")))
    first.weights(0, [])
    first.weights(1, [Feedback(0, {"a": 9.0, "b": 1.0, "c": 1.0}, shares=dict.fromkeys("abc", 1 / 3))])
    in_force = first.weights(2, [])
    second = open_policy(config({"max_change": 0.1}, kind="static", a={"weight": 8.0}), Context(("a", "b", "c")))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.weights(3, [])["a"] == pytest.approx(in_force["a"] + 0.1)
    third = open_policy(config(kind="ado"), Context(("a", "b", "c")))
    third.load_state_dict(first.state_dict())
    assert third.state_dict()["policy"] == make_policy("ado", {}, dict.fromkeys("abc", 1.0)).state_dict()
