"""Pacing: which bands are open when, worked by hand."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
from one_policy import SIZES, context, policy, shares

from data_scheduler.policies import Feedback, Policy, make_policy
from headrace.errors import ConfigError

BANDS = {"w": ("w.1", "w.2", "w.3", "w.4")}
QUARTERS = {"w.1": 1.0, "w.2": 1.0, "w.3": 1.0, "w.4": 1.0, "t": 4.0}


def pacing(function: str, initial: Mapping[str, float] = QUARTERS, **options: Any) -> Policy:
    known = context(names=tuple(initial), bands=BANDS, seed=7)
    return make_policy("pacing", {"function": function, **options}, initial, known)


def bands(made: Policy, step: int) -> list[float]:
    """What the bands of w get of w's share, which is half of all whatever they get."""
    given = shares(made, step)
    assert given["t"] == pytest.approx(0.5)
    return [given[f"w.{number}"] * 2 for number in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("function", "options", "opened"),
    [
        # {step of 100: c}; b = 1/4 unless given
        ("constant", {}, {0: 1.0, 50: 1.0}),
        ("constant", {"start": 0.5}, {0: 0.5, 99: 0.5}),
        ("linear", {}, {0: 0.25, 50: 0.25 + 0.75 * 0.5, 100: 1.0}),
        # √(1/16 + 15/16·x): 0.25, √(0.53125) = 0.728869, √(0.765625) = 0.875
        ("root", {}, {0: 0.25, 50: 0.728869, 75: 0.875, 100: 1.0}),
        # (1/64 + 63/64·x)^(1/3) at 0.5: 0.5078125^(1/3) = 0.797813
        ("root", {"exponent": 3.0}, {50: 0.797813}),
        ("root", {"exponent": 1.0, "start": 0.1}, {50: 0.1 + 0.9 * 0.5}),
        # four levels: a quarter more each quarter of the run
        ("step", {}, {0: 0.25, 24: 0.25, 25: 0.5, 50: 0.75, 75: 1.0, 100: 1.0}),
        ("step", {"levels": 2, "start": 0.5}, {49: 0.5, 50: 1.0}),
        # 4^−(1 − x): 1/4, 4^−0.5 = 0.5, 4^−0.25 = 0.707107
        ("geometric", {}, {0: 0.25, 50: 0.5, 75: 0.707107, 100: 1.0}),
        # two cycles: at 0, 25, 50, 75 % of the run: b, 1, b, 1; half way up √b
        ("cyclical", {"cycles": 2.0}, {0: 0.25, 12.5: 0.5, 25: 1.0, 50: 0.25, 75: 1.0, 100: 1.0}),
    ],
)
def test_pacing_functions(function: str, options: dict[str, Any], opened: dict[float, float]) -> None:
    made = pacing(function, **options, to_tokens=300)  # three tokens a step
    for step, c in opened.items():
        expected = [min(0.25, max(0.0, c - 0.25 * number)) / c for number in range(4)]
        assert bands(made, step) == pytest.approx(expected, abs=1e-6), (step, c)  # type: ignore[arg-type]


def test_pacing_draws_from_the_easiest_part_evenly() -> None:
    # Bands of 0.1, 0.2, 0.3, 0.4 of the text; linear from 0.2: at half c = 0.6, so 0.1, 0.2 and 0.3 of 0.6.
    sizes = {"w.1": 0.4, "w.2": 0.8, "w.3": 1.2, "w.4": 1.6, "t": 4.0}
    made = pacing("linear", sizes, start=0.2)
    assert bands(made, 50) == pytest.approx([1 / 6, 1 / 3, 1 / 2, 0])
    # at a quarter c = 0.4: 0.1, 0.2, and 0.1 of the third
    assert bands(made, 25) == pytest.approx([0.25, 0.5, 0.25, 0])


def test_pacing_replays_easier_bands() -> None:
    sizes = {"w.1": 0.4, "w.2": 0.8, "w.3": 1.2, "w.4": 1.6, "t": 4.0}
    made = pacing("linear", sizes, start=0.05, replay=0.3)
    assert bands(made, 0) == pytest.approx([1, 0, 0, 0])
    # c = 0.05 + 0.95·0.4 = 0.43 is in the third; 0.1 and 0.2 were passed and share 0.3 as 1 : 2
    assert bands(made, 40) == pytest.approx([0.1, 0.2, 0.7, 0])
    # c = 1: 0.1, 0.2, 0.3 share 0.3
    assert bands(made, 100) == pytest.approx([0.05, 0.1, 0.15, 0.7])
    # Bands of unequal sizes: still one more each quarter of the run.
    by_band = pacing("step", sizes)
    assert bands(by_band, 25) == pytest.approx([1 / 3, 2 / 3, 0, 0])
    assert bands(by_band, 74) == pytest.approx([1 / 6, 1 / 3, 1 / 2, 0])
    one_at_a_time = pacing("step", replay=0.0)
    assert [bands(one_at_a_time, step).index(1.0) for step in (0, 24, 25, 50, 75, 99)] == [0, 0, 1, 2, 3, 3]


def test_pacing_in_other_orders() -> None:
    anti = pacing("step", order="anti")
    assert bands(anti, 0) == [0, 0, 0, 1]
    assert bands(anti, 50) == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3])
    firsts = set()
    for seed in range(20):
        known = context(names=tuple(QUARTERS), bands=BANDS, seed=seed)
        options = {"function": "step", "order": "random"}
        drawn = bands(make_policy("pacing", options, QUARTERS, known), 0)
        assert sorted(drawn) == [0, 0, 0, 1]
        assert bands(make_policy("pacing", options, QUARTERS, known), 0) == drawn
        firsts.add(drawn.index(1))
    assert firsts == {0, 1, 2, 3}


def test_pacing_begins_and_ends_where_it_is_told() -> None:
    made = pacing("linear", from_step=20, to_step=60)
    assert bands(made, 0) == bands(made, 20) == [1, 0, 0, 0]
    assert bands(made, 40) == pytest.approx([0.25 / 0.625, 0.25 / 0.625, 0.125 / 0.625, 0])
    assert bands(made, 60) == bands(made, 99) == pytest.approx([0.25] * 4)
    assert bands(pacing("linear", from_share=0.2, to_share=0.6), 40) == pytest.approx(bands(made, 40))
    assert bands(pacing("linear", from_tokens=60, to_tokens=180), 40) == bands(made, 40)


def test_pacing_with_a_policy_between_the_sources() -> None:
    # Mean losses by tokens: w (2·100 + 4·300)/400 = 3.5, t 1.0. What ODM makes of these two it makes of w and t.
    initial = {"w.1": 0.5, "w.2": 0.5, "w.3": 0.5, "w.4": 0.5, "t": 2.0}
    outer = {"kind": "odm", "options": {"warmup_steps": 1}}
    made = pacing("linear", initial, outer=outer)
    alone = make_policy("odm", {"warmup_steps": 1}, {"w": 2.0, "t": 2.0}, context(names=("w", "t")))
    assert made.uses_feedback
    told = Feedback(
        0, {"w.1": 2.0, "w.2": 4.0, "t": 1.0}, {"w.1": 100, "w.2": 300, "t": 400}, {}, {"w.1": 0.5, "t": 0.5}
    )
    whole = Feedback(0, {"w": 3.5, "t": 1.0}, {"w": 400, "t": 400}, {}, {"w": 0.5, "t": 0.5})
    for step in (3, 4):
        expected = shares(alone, step, whole) if step == 3 else shares(alone, step)
        given = shares(made, step, told) if step == 3 else shares(made, step)
        assert sum(given[f"w.{number}"] for number in (1, 2, 3, 4)) == pytest.approx(expected["w"])
        assert expected["w"] != pytest.approx(0.5)
    assert made.state_dict() == alone.state_dict()
    again = pacing("linear", initial, outer=outer)
    again.load_state_dict(json.loads(json.dumps(made.state_dict())))
    assert shares(again, 5) == shares(made, 5)
    # Sizes are those of whole sources: 4 bands of 20 beside 20.
    sized = make_policy(
        "pacing",
        {"function": "constant", "outer": {"kind": "proportional"}},
        initial,
        context(names=tuple(initial), bands=BANDS, size_of=lambda name: SIZES["a"]),
    )
    assert shares(sized)["t"] == pytest.approx(1 / 5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"function": "cubic"}, "function: "),
        ({}, "function is required"),
        ({"function": "linear", "cycles": 3.0}, "cycles: an option of function 'cyclical', not of 'linear'"),
        ({"function": "linear", "from_step": 3, "to_share": 0.5}, "in one unit, not in step and share"),
        ({"function": "linear", "from_step": 3}, "to_step: required with from_step"),
        ({"function": "linear", "from_share": 0.5, "to_share": 0.5}, "to_share: 0.5 does not come after 0.5"),
        ({"function": "linear", "start": 0.0}, "start: "),
        ({"function": "linear", "replay": 1.0}, "replay: "),
        ({"function": "linear", "outer": {"kind": "pacing"}}, "'pacing' paces bands"),
        ({"function": "linear", "outer": {"options": {}}}, "give {kind: POLICY"),
        ({"function": "linear", "outer": {"kind": "odd"}}, "no policy 'odd'"),
    ],
)
def test_pacing_refuses(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        make_policy("pacing", options, QUARTERS, context(names=tuple(QUARTERS), bands=BANDS))
    assert "\n" not in str(error.value)


def test_pacing_needs_bands_and_an_end() -> None:
    with pytest.raises(ConfigError, match="needs a source with `bands`"):
        policy("pacing", function="linear")
    with pytest.raises(ConfigError, match=r"from_share and to_share need train\.steps"):
        make_policy(
            "pacing", {"function": "linear"}, QUARTERS, context(names=tuple(QUARTERS), bands=BANDS, run_steps=None)
        )
