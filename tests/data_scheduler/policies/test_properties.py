"""What holds for every policy, bare and behind guard-rails, whatever the losses."""

import json
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_scheduler import policies
from data_scheduler.policies import BUILT_IN, Feedback, Policy, make_policy
from data_scheduler.policies.context import Context, SourceSize
from headrace.errors import ConfigError

NAMES = ("web", "code", "books")
INITIAL = {"web": 2.0, "code": 1.0, "books": 1.0}
STAGES = [{"from_tokens": 40, "weights": {"web": 1, "code": 3}, "shape": "linear"}, {"from_tokens": 90, "mixture": "m"}]
OPTIONS: dict[str, dict[str, Any]] = {
    "ado": {"refit_every": 4, "ignore_steps": 2, "mean_of": 1},
    "aioli": {"round_steps": 12, "turn_steps": 1, "sweeps": 1},
    "doremi": {"reference": "recorded"},
    "mastery": {"refit_every": 4, "ignore_steps": 2, "mean_of": 1, "at": 0.5, "until": 0.8},
    "odm": {"warmup_steps": 3},
    "pacing": {"function": "cyclical", "replay": 0.1, "outer": {"kind": "odm", "options": {"warmup_steps": 3}}},
    "schedule": {"stages": STAGES, "mixtures": {"m": {"books": 1.0}}},
    "skill_it": {"round_steps": 4, "graph": {"web": {"code": 0.5}}},
}
LISTENING = sorted(kind for kind in BUILT_IN if kind in OPTIONS and kind != "schedule")
"""`pacing` by the policy between its sources."""
CONTEXT = Context(
    NAMES,
    run_steps=60,
    horizon=2,
    held_out=frozenset(NAMES),
    size_of=lambda name: SourceSize(400, 100.0 * len(name)),
    tokens_before=lambda step: 3 * step,
    bands={"all": ("web", "books")},
    recall=lambda name, measure: {"web": 3.0, "code": 2.0, "books": 2.5} if "losses of" in name else measure(),
)


def made(kind: str, initial: Mapping[str, float] = INITIAL) -> Policy:
    return make_policy(kind, OPTIONS.get(kind, {}), initial, CONTEXT)


loss = st.one_of(
    st.floats(0.0, 12.0), st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -3.0, 1e-300, 1e300, 5e5, 1e12])
)
some = st.dictionaries(st.sampled_from(NAMES), loss)  # sources may be missing, or all of them
every = st.fixed_dictionaries(dict.fromkeys(NAMES, st.floats(0.5, 12.0)))
report = st.tuples(st.one_of(some, every), st.one_of(some, every), st.integers(0, 1 << 20))
reports = st.lists(report, min_size=1, max_size=45)
long_reports = st.lists(report, min_size=26, max_size=36)  # long enough for fits, rounds and sweeps


def run(policy: Policy, told: list[Any], given: list[dict[str, float]], stop: int) -> list[dict[str, float]]:
    """The weights of every step up to `stop`, those before in `given`: reports come `horizon` steps later, with the
    shares that their step was drawn with."""
    given = list(given)
    for step in range(len(given), stop):
        heard, reported = [], step - CONTEXT.horizon
        if policy.uses_feedback and reported >= 0:
            losses, held_out, tokens = told[reported]
            shares = {name: weight / sum(given[reported].values()) for name, weight in given[reported].items()}
            heard = [Feedback(reported, losses, dict.fromkeys(losses, tokens), held_out, shares)]
        given.append(dict(policy.weights(step, heard)))
    return given


@pytest.mark.parametrize("kind", sorted(BUILT_IN))
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(told=reports)
def test_weights_are_weights_whatever_is_reported(kind: str, told: list[Any]) -> None:
    for weights in run(made(kind), told, [], len(told)):
        assert set(weights) <= set(NAMES)
        assert all(math.isfinite(weight) and weight >= 0 for weight in weights.values()), weights
        assert sum(weights.values()) > 0


@pytest.mark.parametrize("kind", sorted(BUILT_IN))
@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.too_slow])
@given(told=long_reports, data=st.data())
def test_a_state_in_the_middle_continues_to_the_bit(kind: str, told: list[Any], data: st.DataObject) -> None:
    stop = data.draw(st.integers(0, len(told)))
    expected = run(made(kind), told, [], len(told))
    first, second = made(kind), made(kind)
    begun = run(first, told, [], stop)
    state = first.state_dict()
    saved = json.dumps(state)
    second.load_state_dict(json.loads(saved))
    assert run(second, told, begun, len(told)) == expected
    run(first, told, begun, len(told))
    assert json.dumps(state) == saved, "a state that was given out must not change"


@pytest.mark.parametrize("kind", sorted(set(BUILT_IN) - {"schedule", "static"}))
def test_a_source_that_is_switched_off_stays_off(kind: str) -> None:
    policy = make_policy(kind, OPTIONS.get(kind, {}), {"web": 1.0, "code": 0.0, "books": 1.0}, CONTEXT)
    told = [({"web": 3.0, "code": 9.0, "books": 2.0}, {"web": 3.0, "code": 9.0, "books": 2.0}, 64)] * 30
    assert all(weights.get("code", 0.0) == 0 for weights in run(policy, told, [], 30))


@pytest.mark.parametrize("kind", LISTENING)
def test_one_source_and_two_hundred_work(kind: str) -> None:
    for names in (["web"], [f"s{number}" for number in range(200)]):
        context = Context(
            tuple(names),
            run_steps=10_000,
            recall=lambda *_, names=names: dict.fromkeys(names, 2.0),  # type: ignore[misc]
            bands={"all": tuple(names[: len(names) // 2 + 1])},
        )
        options = {"ado": {"refit_every": 20, "ignore_steps": 0}, "aioli": {"turn_steps": 1, "sweeps": 1}}.get(kind, {})
        options = options | ({"reference": "recorded"} if kind == "doremi" else {})
        options = options | ({"graph": {}} if kind == "skill_it" else {})
        options = options | ({"function": "root", "outer": {"kind": "odm"}} if kind == "pacing" else {})
        policy = make_policy(kind, options, dict.fromkeys(names, 1.0), context)
        for step in range(25):
            losses = {name: 3.0 + (7 * place + step) % 11 / 10 for place, name in enumerate(names)}
            weights = policy.weights(step + 1, [Feedback(step, losses, dict.fromkeys(names, 8), losses)])
        assert set(weights) == set(names)
        assert sum(weights.values()) > 0


def test_the_table_and_the_entry_points_say_the_same() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["headrace.policies"] == dict(BUILT_IN)


class Entry:
    def __init__(self, name: str, value: str) -> None:
        self.name, self.value = name, value


def test_an_entry_point_never_hides_another_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    own = "data_scheduler.policies.static:Static"
    offered = [
        Entry("mine", own),
        Entry("odm", own),
        Entry("twice", own),
        Entry("twice", "a:B"),
        Entry("gone", "no.x:Y"),
    ]
    monkeypatch.setattr(policies, "entry_points", lambda group: offered)
    assert make_policy("mine", {}, INITIAL).weights(0, []) == INITIAL
    for kind, message in [("odm", "more than one policy"), ("twice", "more than one"), ("gone", "cannot be loaded")]:
        with pytest.raises(ConfigError, match=message):
            make_policy(kind, {}, INITIAL)
    with pytest.raises(ConfigError, match=r"no policy 'omd' \(known: ado, aioli, .*mine"):
        make_policy("omd", {}, INITIAL)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("ado", {"gamma1": 2}, "gamma1: input should be less than or equal to 1, got 2"),
        ("ado", {"gama1": 0.1}, "no option 'gama1'"),
        ("doremi", {}, "reference is required"),
        ("doremi", {"reference": "/nowhere"}, "no metrics.jsonl there"),
        ("static", {"weights": 1}, "unexpected keyword argument 'weights'"),
        ("static", {"context": 1}, "'context' is not an option"),
        ("aioli", {"round_steps": 14, "turn_steps": 1}, "must be larger than 14: 4 sweeps of 3 turns of 1 steps"),
        ("aioli", {"own_share": 0.2}, "above 1/3"),
        ("mastery", {"until": 0.01}, "must be larger than at"),
        ("skill_it", {"graph": {"news": {}}}, "no source 'news'"),
        ("skill_it", {"graph": {"web": {"code": -1.0}}}, "from 0 on"),
        ("skill_it", {"graph": "/nowhere.json"}, "/nowhere.json: No such file"),
    ],
)
def test_mistakes_are_one_line(kind: str, options: dict[str, Any], message: str) -> None:
    from dataclasses import replace

    context = replace(CONTEXT, recall=Context(NAMES).recall)
    with pytest.raises(ConfigError) as caught:
        make_policy(kind, options, INITIAL, context)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_a_policy_needs_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="set val_paths of code, books"):
        make_policy("aioli", {}, INITIAL, Context(NAMES, held_out=frozenset({"web"})))
    with pytest.raises(ConfigError, match="tokens is required"):
        make_policy("unimax", {}, INITIAL, Context(NAMES))
    with pytest.raises(ConfigError, match=r"needs train\.steps"):
        make_policy("schedule", {"stages": [{"from_share": 0.5, "weights": {"web": 1}}]}, INITIAL, Context(NAMES))
    with pytest.raises(ConfigError, match="needs a run's files"):
        make_policy("proportional", {}, INITIAL)
