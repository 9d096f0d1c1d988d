"""Changing a run's data while it goes on: from which step, what undoing means, and that every way there is the same."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_corpus import jsonl, make_documents

from data_scheduler import DataConfig, Feedback, Journal, Scheduler, batch_sha256, merge_states, policy_turns
from data_scheduler.control import (
    Decision,
    RefusedError,
    check_something_left,
    decide_mixture,
    decide_quarantine,
    decide_undo,
    first_step,
    settle,
)
from data_scheduler.manifest import Manifest
from data_scheduler.mixture import ONE, Mixer
from data_scheduler.plan import Plan
from data_scheduler.replay import replay

Make = Callable[..., DataConfig]
NAMES = list("abcd")
COUNT = iter(range(10**6))


def mix(scheduler: Scheduler, weights: Mapping[str, float], over: int = 0, step: int | None = None) -> Decision:
    return named(decide_mixture(scheduler.names, weights, scheduler.earliest_change if step is None else step, over))


def named(decision: Decision) -> Decision:
    decision.data["command"] = f"command-{next(COUNT)}"
    return decision


def shares(scheduler: Scheduler) -> list[int]:
    return np.bincount(next(scheduler).source_ids, minlength=len(scheduler.names)).tolist()


# -- from which step -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_a_change_begins_with_the_first_step_that_cannot_have_been_prepared(data_config: Make, prefetch: int) -> None:
    scheduler = Scheduler(data_config(prefetch=prefetch))
    for source in (0, 3, 1):
        for _ in range(3):
            next(scheduler)
        time.sleep(0.3)  # the loader's thread prepares all it may
        begins = scheduler.earliest_change
        assert begins == scheduler.next_step + (prefetch + 1 if prefetch else 0)
        scheduler.take(mix(scheduler, {NAMES[source]: 1.0}), "user:ada")
        counts = {step: shares(scheduler) for step in range(scheduler.next_step, begins + 2)}
        assert counts[begins][source] >= 23
        assert all(count[source] < 23 for step, count in counts.items() if step < begins)
    scheduler.close()


def test_at_names_a_step_or_counts_from_the_next() -> None:
    assert first_step(None, 100, 103) == 103
    assert first_step("+200", 100, 103) == 300
    assert first_step("+0", 100, 103) == 103
    assert first_step("104", 100, 103) == 104
    with pytest.raises(RefusedError, match="step 99 is over; the earliest that can change is 103"):
        first_step("99", 100, 103)
    with pytest.raises(RefusedError, match="step 101 is prepared already"):
        first_step("101", 100, 103)


# -- who decides -----------------------------------------------------------------------------------------------------


class Moody:
    """Test policy: changes its mind every step and remembers how often it was asked."""

    uses_feedback = False

    def __init__(self, initial: Mapping[str, float]) -> None:
        self._names, self.asked = list(initial), 0

    def weights(self, step: int, feedback: Sequence[Feedback]) -> Mapping[str, float]:
        self.asked += 1
        return {name: 1.0 + (self.asked + number) % 3 for number, name in enumerate(self._names)}

    def state_dict(self) -> dict[str, Any]:
        return {"asked": self.asked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.asked = state.get("asked", 0)


def test_what_a_person_set_holds_against_a_policy_that_keeps_changing_its_mind(
    data_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy_turns, "open_policy", lambda *about: Moody(about[-1]))
    scheduler = Scheduler(data_config())
    for _ in range(3):
        next(scheduler)
    first = scheduler.take(mix(scheduler, {"d": 1.0}), "user:ada")
    assert all(shares(scheduler)[3] >= 23 for _ in range(6))
    assert scheduler.state_dict()["policy"] == {"asked": 9}  # it goes on listening
    scheduler.take(named(decide_undo(scheduler.journal, first.seq, 9, scheduler.earliest_change)), "user:ada")
    assert all(shares(scheduler)[3] < 20 for _ in range(4))
    scheduler.take(mix(scheduler, {"d": 1.0}), "user:ada")
    assert shares(scheduler)[3] >= 23
    chosen = Decision("policy", scheduler.earliest_change, {"kind": "static", "options": {}})
    policy = scheduler.take(named(chosen), "user:ada")
    assert shares(scheduler)[3] < 20
    assert scheduler.state_dict()["policy"] == {"asked": 1}  # it begins afresh
    scheduler.take(named(decide_undo(scheduler.journal, policy.seq, 15, scheduler.earliest_change)), "user:ada")
    assert shares(scheduler)[3] >= 23  # before the policy, the person's mixture held


# -- every way there is the same -------------------------------------------------------------------------------------

Step = st.integers(0, 24)
Asked = st.lists(
    st.one_of(
        st.tuples(st.just("mix"), Step, st.sampled_from(NAMES), st.integers(0, 6)),
        st.tuples(st.just("policy"), Step, st.sampled_from(["static", "schedule"]), st.just(0)),
        st.tuples(st.just("quarantine"), Step, st.sampled_from(NAMES), st.just(0)),
        st.tuples(st.just("undo"), Step, st.just(""), st.integers(0, 9)),
    ),
    max_size=8,
)
STAGES = {"stages": [{"from_step": step, "weights": {NAMES[step % 4]: 1.0, "a": 0.5}} for step in range(1, 30, 4)]}


def decide(scheduler: Scheduler, what: str, name: str, number: int) -> Decision:
    earliest = scheduler.earliest_change
    if what == "mix":
        return mix(scheduler, {name: 2.0, "b": 1.0}, number if number > 1 else 0)
    if what == "policy":
        return named(Decision("policy", earliest, {"kind": name, "options": STAGES if name == "schedule" else {}}))
    if what == "quarantine":
        return named(decide_quarantine(NAMES, name, scheduler.plan, earliest))
    mine = [event.seq for event in scheduler.journal.events if event.by == "user:ada"]
    if number >= len(mine):
        raise RefusedError("no such event")
    return named(decide_undo(scheduler.journal, mine[number], scheduler.next_step, earliest))


@settings(max_examples=12, deadline=None)
@given(Asked, st.integers(1, 24), st.integers(0, 3))
def test_live_replayed_resumed_elsewhere_and_known_from_the_start_are_the_same(
    data_config: Make, tmp_path_factory: pytest.TempPathFactory, asked: Any, stop: int, prefetch: int
) -> None:
    run = tmp_path_factory.mktemp("run")
    config = data_config(prefetch=prefetch, global_batch_size=8, lanes=8, seq_len=32)
    scheduler = Scheduler(config, run_dir=run)
    live, state = [], None
    for step in range(25):
        if step == stop:
            state = scheduler.state_dict()
        for what, at, name, number in asked:
            if at != step:
                continue
            try:
                decision = decide(scheduler, what, name, number)
                check_something_left(scheduler.journal, decision, "user:ada")
            except RefusedError:
                continue
            scheduler.take(decision, "user:ada")
        live.append(batch_sha256(next(scheduler).digests))
    scheduler.close()
    assert [batch_sha256(batch.digests) for batch in replay(run, 0, 24)] == live

    known = Journal()
    for event in scheduler.journal.events:
        if event.by == "user:ada" or event.kind in ("run_started", "manifest"):
            known.append(event.kind, event.step, event.data, event.by)
    told = Scheduler(config, journal=known)
    assert [batch_sha256(next(told).digests) for _ in range(25)] == live
    told.close()

    ranks = []  # of a run that was killed after step 24 and goes on from an earlier checkpoint, on two ranks
    for rank in range(2):
        ranks.append(Scheduler(config, dp_rank=rank, dp_size=2, run_dir=run))
        ranks[rank].load_state_dict(state or {})
    for step in range(stop, 25):
        batches = [next(rank) for rank in ranks]
        assert batch_sha256([d for row in zip(*(b.digests for b in batches), strict=True) for d in row]) == live[step]
    for rank in ranks:
        rank.close()
    merge_states([rank.state_dict() for rank in ranks])


def test_a_source_that_joins_is_the_same_live_and_after_a_restart_before_it(data_config: Make, tmp_path: Path) -> None:
    config = data_config(prefetch=2)
    (tmp_path / "e.jsonl").write_bytes(jsonl(make_documents("e", 100, 0)))
    source = config.sources[0].model_copy(update={"name": "e", "paths": [str(tmp_path / "e.jsonl")], "weight": 0.5})
    scheduler = Scheduler(config, run_dir=tmp_path / "run")
    live = [batch_sha256(next(scheduler).digests) for _ in range(4)]
    state = scheduler.state_dict()
    live += [batch_sha256(next(scheduler).digests) for _ in range(4)]
    manifest = Manifest.take(source)
    scheduler.take(Decision("manifest", 8, manifest.to_data()), "system")
    scheduler.take(named(Decision("source_added", 8, {"source": source.model_dump(mode="json")})), "user:ada")
    scheduler = scheduler.with_source(source)
    counts = [0] * 5
    for _ in range(8):
        batch = next(scheduler)
        counts = [a + b for a, b in zip(counts, np.bincount(batch.source_ids, minlength=5).tolist(), strict=True)]
        live.append(batch_sha256(batch.digests))
    scheduler.close()
    assert counts[4] == pytest.approx(8 * 24 * 0.5 / 1.5, abs=1)
    again = Scheduler(config.model_copy(update={"sources": [*config.sources, source]}), run_dir=tmp_path / "run")
    again.load_state_dict(state)
    assert [batch_sha256(next(again).digests) for _ in range(12)] == live[4:]
    again.close()
    assert [batch_sha256(batch.digests) for batch in replay(tmp_path / "run", 0, 15)] == live


@pytest.mark.parametrize("kind", ["static", "proportional", "temperature", "odm", "ado", "mastery"])
def test_a_source_may_join_under_any_policy(data_config: Make, tmp_path: Path, kind: str) -> None:
    config = data_config(prefetch=2, policy={"kind": kind})
    (tmp_path / "e.jsonl").write_bytes(jsonl(make_documents("e", 100, 0)))
    source = config.sources[0].model_copy(update={"name": "e", "paths": [str(tmp_path / "e.jsonl")], "weight": 0.5})
    scheduler = Scheduler(config, run_steps=100)
    drawn = 0
    for step in range(24):
        if step == 12:
            manifest = Manifest.take(source)
            scheduler.try_policy(kind, {}, (source, manifest))
            scheduler.take(Decision("manifest", 12, manifest.to_data()), "system")
            added = Decision("source_added", 12, {"source": source.model_dump(mode="json")})
            scheduler.take(named(added), "user:ada")
            scheduler = scheduler.with_source(source)
        batch = next(scheduler)
        drawn += int((batch.source_ids == 4).sum())
        names = scheduler.names
        scheduler.feedback(step, dict.fromkeys(names, 3.0), dict.fromkeys(names, 10))
    scheduler.close()
    assert drawn > 12


# -- quarantine ------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 100), min_size=3, max_size=6).filter(any), st.integers(1, 40), st.data())
def test_nothing_is_drawn_from_a_source_under_quarantine(weights: list[int], steps: int, data: st.DataObject) -> None:
    """What it was still owed goes to another, so that it is not drawn once more to make up for it."""
    given_shares = np.array(weights, dtype=np.int64) * (ONE // sum(weights))
    given_shares[int(np.argmax(weights))] += ONE - given_shares.sum()
    mixer = Mixer(len(weights))
    for _ in range(steps):
        mixer.counts(given_shares, 7)
    out = data.draw(st.lists(st.integers(0, len(weights) - 1), min_size=1, max_size=len(weights) - 1, unique=True))
    left = given_shares.copy()
    left[out] = 0
    if not left.any():
        return
    left[int(left.argmax())] += ONE - left.sum()
    mixer.owed = settle(mixer.owed, left, out)
    assert int(mixer.owed.sum()) == 0
    for _ in range(20):
        assert not mixer.counts(left, 7)[out].any()


def test_a_source_under_quarantine_gives_nothing_until_that_is_undone(data_config: Make) -> None:
    scheduler = Scheduler(data_config(prefetch=2))
    for _ in range(3):
        next(scheduler)
    begins = scheduler.earliest_change
    event = scheduler.take(named(decide_quarantine(NAMES, "a", scheduler.plan, begins)), "user:ada")
    counts = {step: shares(scheduler) for step in range(3, begins + 6)}
    assert all(bool(count[0]) == (step < begins) for step, count in counts.items())
    assert np.sum([counts[step] for step in range(begins, begins + 6)], axis=0)[1] == pytest.approx(72, abs=2)
    scheduler.take(named(decide_undo(scheduler.journal, event.seq, 0, scheduler.earliest_change)), "user:ada")
    for _ in range(4):
        last = shares(scheduler)
    assert last[0] > 0
    scheduler.close()


def test_a_policy_that_wants_nothing_but_what_is_under_quarantine_does_not_end_the_run(
    data_config: Make, tmp_path: Path
) -> None:
    stages = {"stages": [{"from_step": 4, "weights": {"a": 1.0}}]}
    config = data_config(policy={"kind": "schedule", "options": stages})
    scheduler = Scheduler(config, run_dir=tmp_path)
    next(scheduler)
    for number, name in enumerate("abc"):
        decision = named(decide_quarantine(NAMES, name, scheduler.plan, scheduler.earliest_change))
        check_something_left(scheduler.journal, decision, "user:ada")
        scheduler.take(decision, "user:ada")
        counts = np.sum([shares(scheduler) for _ in range(4)], axis=0)
        assert not counts[: number + 1].any()
        assert counts[number + 1 :].all()
    with pytest.raises(RefusedError, match="no source with a weight would be left"):
        check_something_left(scheduler.journal, decide_quarantine(NAMES, "d", scheduler.plan, 20), "user:ada")
    assert all(not (batch.source_ids[:] < 3).any() for batch in replay(tmp_path, 9, 12))


# -- refusals --------------------------------------------------------------------------------------------------------


def test_what_would_leave_nothing_is_refused(data_config: Make) -> None:
    scheduler = Scheduler(data_config())
    next(scheduler)
    later = mix(scheduler, {"a": 1.0}, step=50)
    scheduler.take(later, "user:ada")
    with pytest.raises(RefusedError, match="at step 50 no source with a weight would be left"):
        check_something_left(scheduler.journal, decide_quarantine(NAMES, "a", scheduler.plan, 1), "user:ada")
    check_something_left(scheduler.journal, decide_quarantine(NAMES, "b", scheduler.plan, 1), "user:ada")


def test_a_run_may_be_changed_before_its_first_step(data_config: Make) -> None:
    scheduler = Scheduler(data_config())
    for decision in (Decision("stop_at", 0, {"value": 4}), decide_quarantine(NAMES, "a", scheduler.plan, 0)):
        check_something_left(scheduler.journal, decision, "user:ada")
        scheduler.take(named(decision), "user:ada")
    assert shares(scheduler)[0] == 0
    with pytest.raises(RefusedError, match="at step 1 no source"):
        check_something_left(scheduler.journal, mix(scheduler, {"a": 1.0}), "user:ada")


@pytest.mark.parametrize("weights", [{}, {"a": 0.0}, {"a": -1.0}, {"a": float("nan")}, {"a": float("inf")}, {"z": 1.0}])
def test_weights_that_are_none_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(RefusedError):
        decide_mixture(NAMES, weights, 5, 0)


def test_the_configuration_takes_the_mixture_back_when_it_changes(data_config: Make, tmp_path: Path) -> None:
    scheduler = Scheduler(data_config(), run_dir=tmp_path)
    next(scheduler)
    scheduler.take(mix(scheduler, {"d": 1.0}), "user:ada")
    assert shares(scheduler)[3] >= 23
    same = Scheduler(data_config(), run_dir=tmp_path)
    same.load_state_dict(scheduler.state_dict())
    assert shares(same)[3] >= 23
    stages = {"stages": [{"from_step": 0, "weights": {"b": 1.0}}]}
    changed = Scheduler(data_config(policy={"kind": "schedule", "options": stages}), run_dir=tmp_path)
    changed.load_state_dict(same.state_dict())
    assert shares(changed)[1] >= 23
    assert Plan(changed.journal).configured(3)["kind"] == "schedule"
