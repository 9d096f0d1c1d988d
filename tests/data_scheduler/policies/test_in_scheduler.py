"""Policies in a real scheduler: stopped anywhere, continued at another data-parallel size, replayed from the journal.

The model is a pure function: the loss of a source depends on the step, the source and the tokens it had so far.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_scheduler import DataConfig, Journal, Scheduler, batch_sha256, merge_states
from data_scheduler.control import Decision, decide_mixture, decide_quarantine
from data_scheduler.replay import replay
from data_scheduler.state import Snapshots, load_state, save_state
from headrace.errors import ConfigError

Make = Callable[..., DataConfig]
STEPS, STOP = 36, 17
OPTIONS: dict[str, dict[str, Any]] = {
    "ado": {"refit_every": 6, "ignore_steps": 0, "mean_of": 1},
    "aioli": {"round_steps": 14, "turn_steps": 1, "sweeps": 2, "own_share": 0.6},
    "doremi": {},
    "mastery": {"refit_every": 6, "ignore_steps": 0, "mean_of": 1, "at": 0.4, "until": 0.6},
    "odm": {"warmup_steps": 4},
    "skill_it": {"round_steps": 5, "graph": {"a": {"b": 0.5}}},
}


class Model:
    """Loss of source i after n of its tokens: floor + 4·(1 + n/500)^−speed, and a ripple by step."""

    def __init__(self, names: list[str]) -> None:
        self.names, self.seen = names, dict.fromkeys(names, 0)

    def loss(self, name: str, step: int) -> float:
        place = self.names.index(name)
        ripple = ((7 * step + 3 * place) % 11) / 50
        return 1.0 + 0.3 * place + 4 * (1 + self.seen[name] / 500) ** (-0.2 - 0.6 * place) + ripple


def go(ranks: list[Scheduler], model: Model, first: int, last: int, kept: dict[int, Any] | None = None) -> list[str]:
    """Steps [first, last) on all ranks; hashes of their global batches."""
    hashes = []
    for step in range(first, last):
        if all(rank.wants_validation for rank in ranks):
            for rank in ranks:
                rank.validated({name: model.loss(name, step) for name in model.names})
        if kept is not None and step == STOP:
            # A checkpoint as training takes it: after the evaluation, before the next step.
            kept[step] = merge_states([rank.state_dict() for rank in ranks])
            kept["seen"] = dict(model.seen)
        digests: dict[int, bytes] = {}
        counts: dict[str, int] = dict.fromkeys(model.names, 0)
        for rank in ranks:
            batch = next(rank)
            digests.update(zip(batch.slots.tolist(), batch.digests, strict=True))
            for number, count in enumerate(np.bincount(batch.source_ids, minlength=len(model.names)).tolist()):
                counts[model.names[number]] += count * (batch.tokens.shape[1] - 1)
        hashes.append(batch_sha256([digests[slot] for slot in range(len(digests))]))
        tokens = {name: count for name, count in counts.items() if count}
        losses = {name: model.loss(name, step) for name in tokens}
        for rank in ranks:
            rank.feedback(step, losses, tokens)
        for name, count in tokens.items():
            model.seen[name] += count
    return hashes


@pytest.fixture
def policy_config(data_config: Make, tmp_path: Path) -> Callable[..., DataConfig]:
    """A configuration of a policy that listens, with held-out data and a reference run where it needs them."""

    def make(kind: str, guard: Mapping[str, Any] | None = None, dry_run: bool = False, **changes: Any) -> DataConfig:
        data = data_config().model_dump()
        for source in data["sources"]:
            source["val_paths"] = source["paths"]
        options = OPTIONS[kind]
        if kind == "doremi":
            line = {"step": 0, "source_loss": dict.fromkeys("abcd", 2.0), "source_tokens": dict.fromkeys("abcd", 9)}
            (tmp_path / "reference.jsonl").write_text(json.dumps(line) + "\n")
            options = {"reference": str(tmp_path / "reference.jsonl"), "smoothing": 0.05}
        policy = {"kind": kind, "options": options, "horizon": 3, "guard": guard or {}, "dry_run": dry_run}
        return DataConfig.model_validate(data | {"policy": policy, "prefetch": 2} | changes)

    return make


@pytest.mark.parametrize("kind", sorted(OPTIONS))
def test_a_policy_survives_stop_elastic_resume_and_replay(
    policy_config: Callable[..., DataConfig], tmp_path: Path, kind: str
) -> None:
    config = policy_config(kind, {"max_change": {"mastery": 0.02, "aioli": 0.6}.get(kind, 0.3), "min_share": 0.02})
    run_dir = tmp_path / "run"
    kept: dict[Any, Any] = {}
    whole = [Scheduler(config, run_dir=run_dir)]
    model = Model(whole[0].names)
    expected = go(whole, model, 0, STEPS, kept)
    whole[0].close()
    mixtures = [event for event in whole[0].journal.of("mixture") if event.by == f"policy:{kind}"]
    assert len(mixtures) > 3, "the policy must have moved for this to show anything"

    # Killed after STOP steps, gone on with on three ranks with another prefetch depth: the state through a file.
    save_state(tmp_path / "state.npz", kept[STOP])
    state = load_state(tmp_path / "state.npz")
    (tmp_path / "reference.jsonl").unlink(missing_ok=True)  # the journal has what the policy was given
    journal = (run_dir / "journal.jsonl").read_bytes()
    ranks = []
    for rank in range(3):
        cut = config.model_copy(update={"prefetch": rank})
        ranks.append(
            Scheduler(
                cut,
                dp_rank=rank,
                dp_size=3,
                run_dir=run_dir if rank == 0 else None,
                journal=None if rank == 0 else Journal(run_dir / "journal.jsonl", writable=False),
            )
        )
        ranks[-1].load_state_dict(state)
    again = Model(ranks[0].names)
    again.seen = dict(kept["seen"])
    assert go(ranks, again, STOP, STEPS) == expected[STOP:]
    for scheduler in ranks:
        scheduler.close()
    Snapshots(run_dir).save(merge_states([scheduler.state_dict() for scheduler in ranks]))

    # From the journal alone: no policy, no losses, no kept state.
    assert [batch_sha256(batch.digests) for batch in _replayed(run_dir)] == expected
    assert (run_dir / "journal.jsonl").read_bytes().startswith(journal)


@pytest.mark.parametrize("outer", ["static", "odm"])
@pytest.mark.parametrize("guard", [{}, {"min_share": 0.02, "max_change": 0.1, "update_every": 2}])
def test_a_curriculum_survives_stop_elastic_resume_and_replay(
    data_config: Make, tmp_path: Path, outer: str, guard: dict[str, Any]
) -> None:
    data = data_config().model_dump()
    data["sources"][1]["bands"] = {"by": "length", "count": 3}
    data["sources"][3]["bands"] = {"by": "length", "count": 2, "order": "descending"}
    between = {"kind": outer, "options": {"warmup_steps": 4} if outer == "odm" else {}}
    options = {"function": "root", "replay": 0.25, "outer": between, "to_share": 0.8}
    policy = {"kind": "pacing", "options": options, "horizon": 3, "guard": guard}
    config = DataConfig.model_validate(data | {"policy": policy, "prefetch": 2})
    run_dir, kept = tmp_path / "run", dict[Any, Any]()
    whole = Scheduler(config, run_dir=run_dir, run_steps=STEPS)
    model = Model(whole.names)
    expected = go([whole], model, 0, STEPS, kept)
    whole.close()
    assert whole.names == ["a", "b.1", "b.2", "b.3", "c", "d.1", "d.2"]
    mixtures = [event.data["weights"] for event in whole.journal.of("mixture") if event.by == "policy:pacing"]
    assert len(mixtures) > 2
    least = guard.get("min_share", 0.0)
    assert min(min(weights.values()) for weights in mixtures) == pytest.approx(least, abs=1e-9)
    if outer == "static" and not guard:
        assert all(sum(weights[f"b.{n}"] for n in (1, 2, 3)) == pytest.approx(0.3) for weights in mixtures)
        assert (mixtures[0]["b.1"], mixtures[-1]["b.3"]) == pytest.approx((0.3, 0.3 * 0.75))

    save_state(tmp_path / "state.npz", kept[STOP])
    ranks = []
    for rank in range(3):
        journal = None if rank == 0 else Journal(run_dir / "journal.jsonl", writable=False)
        cut = config.model_copy(update={"prefetch": rank})
        folder = run_dir if rank == 0 else None
        ranks.append(Scheduler(cut, dp_rank=rank, dp_size=3, run_dir=folder, journal=journal, run_steps=STEPS))
        ranks[-1].load_state_dict(load_state(tmp_path / "state.npz"))
    again = Model(ranks[0].names)
    again.seen = dict(kept["seen"])
    assert go(ranks, again, STOP, STEPS) == expected[STOP:]
    for scheduler in ranks:
        scheduler.close()
    Snapshots(run_dir).save(merge_states([scheduler.state_dict() for scheduler in ranks]))
    assert [batch_sha256(batch.digests) for batch in _replayed(run_dir)] == expected


def _replayed(run_dir: Path) -> list[Any]:
    for state in (run_dir / "data_state").iterdir():
        state.unlink()
    return list(replay(run_dir, 0, STEPS - 1))


@pytest.mark.parametrize("kind", ["odm", "skill_it"])
def test_a_state_alone_goes_on_too(policy_config: Callable[..., DataConfig], kind: str) -> None:
    """Without the journal: for people who keep states in their own checkpoints."""
    config = policy_config(kind)
    kept: dict[Any, Any] = {}
    whole = [Scheduler(config)]
    expected = go(whole, Model(whole[0].names), 0, STEPS, kept)
    second = [Scheduler(config)]
    second[0].load_state_dict(json.loads(json.dumps(kept[STOP], default=lambda array: array.tolist())))
    model = Model(second[0].names)
    model.seen = dict(kept["seen"])
    assert go(second, model, STOP, STEPS) == expected[STOP:]
    whole[0].close()
    second[0].close()


def test_sizes_are_measured_once_and_journaled(
    policy_config: Callable[..., DataConfig], data_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = {"kind": "unimax", "options": {"max_epochs": 1.0}}
    first = Scheduler(data_config(policy=policy), run_dir=tmp_path, run_steps=100)
    next(first)
    events = first.journal.of("policy_input")
    assert [event.data["name"] for event in events] == [f"size of {name}" for name in "abcd"]
    sizes = {event.data["name"][-1]: event.data["value"][1] for event in events}
    # 100 steps of 24 · 64 = 153,600 tokens; every source is smaller than what is left for it: each gets its size.
    assert sum(sizes.values()) < 153_600
    total = sum(sizes.values())
    assert first.journal.of("mixture")[0].data["weights"] == pytest.approx({n: s / total for n, s in sizes.items()})
    first.close()
    monkeypatch.setattr("data_scheduler.policy_context.estimate_tokens", lambda *_: pytest.fail("measured again"))
    second = Scheduler(data_config(policy=policy), run_dir=tmp_path, run_steps=100)
    next(second)
    assert len(second.journal.of("policy_input")) == 4
    with pytest.raises(ConfigError, match="tokens is required"):
        Scheduler(data_config(policy=policy), run_dir=tmp_path / "other")
    assert (
        not (tmp_path / "other" / "journal.jsonl").exists() or not (tmp_path / "other" / "journal.jsonl").read_bytes()
    )


def test_a_schedule_by_tokens_counts_stages_of_other_shapes(data_config: Make, tmp_path: Path) -> None:
    # 64 · 24 = 1,536 tokens a step for 4 steps, then 32 · 24 = 768: 7,680 tokens are reached before step 6.
    policy = {"kind": "schedule", "options": {"stages": [{"from_tokens": 7680, "weights": {"d": 1.0}}]}}
    first = Scheduler(data_config(policy=policy), run_dir=tmp_path)
    for _ in range(4):
        next(first)
    state = first.state_dict()
    first.close()
    second = Scheduler(data_config(policy=policy, seq_len=32), run_dir=tmp_path)
    second.load_state_dict(state)
    for _ in range(4):
        next(second)
    assert [event.step for event in second.journal.of("mixture")] == [0, 6]


def test_a_dry_run_changes_no_batch(
    policy_config: Callable[..., DataConfig], data_config: Make, tmp_path: Path
) -> None:
    plain, dry = [Scheduler(data_config())], [Scheduler(policy_config("odm", dry_run=True), run_dir=tmp_path)]
    assert go(plain, Model(plain[0].names), 0, 20) == go(dry, Model(dry[0].names), 0, 20)
    dry[0].close()
    proposed = dry[0].journal.of("proposed")
    assert len(proposed) > 5
    assert {event.by for event in proposed} == {"policy:odm"}
    assert [event.step for event in dry[0].journal.of("mixture")] == [0]
    assert len(_all(replay(tmp_path, 0, 19))) == 20


def _all(batches: Any) -> list[Any]:
    return list(batches)


def test_a_loss_that_is_no_number_freezes_and_the_journal_says_so(
    policy_config: Callable[..., DataConfig], tmp_path: Path
) -> None:
    scheduler = Scheduler(policy_config("odm", {"freeze_steps": 6}, prefetch=0), run_dir=tmp_path)
    for step in range(20):
        next(scheduler)
        loss = float("nan") if step == 8 else 2.0 + (step % 5)
        scheduler.feedback(step, {"a": loss, "b": 1.0, "c": 1.5, "d": 2.5}, dict.fromkeys("abcd", 64))
        if step == 9:  # a NaN in a report that the policy has not heard yet is in the state
            state = json.loads(json.dumps(scheduler.state_dict(), default=lambda array: array.tolist()))
            scheduler.load_state_dict(state)
    frozen = scheduler.journal.of("frozen")
    assert [(event.step, event.data["until"], event.data["reported"]) for event in frozen] == [(11, 17, 8)]
    changed = [event.step for event in scheduler.journal.of("mixture")]
    assert not {*range(11, 17)} & {*changed}
    assert {10, 17} <= {*changed}


def test_reports_say_what_people_made_of_the_mixture(policy_config: Callable[..., DataConfig], tmp_path: Path) -> None:
    """A policy hears with what a step was drawn: a person's mixture, less what is under quarantine."""
    scheduler = Scheduler(policy_config("odm", prefetch=0), run_dir=tmp_path)
    told = []
    for step in range(24):
        if step == 10:
            decision = decide_mixture(scheduler.names, {"a": 2.0, "c": 1.0, "d": 1.0}, 10, over=0)
            scheduler.take(_by_hand(decision, "mix"), "user:ada")
        if step == 20:
            scheduler.take(_by_hand(decide_quarantine(scheduler.names, "a", scheduler.plan, 20), "out"), "user:ada")
        drawn = np.bincount(next(scheduler).source_ids, minlength=4)
        scheduler.feedback(step, {name: 2.0 + step % 3 for name, count in zip("abcd", drawn, strict=True) if count}, {})
        told.append(scheduler.state_dict()["feedback"][-1][4])
    assert told[9]["b"] > 0
    assert told[10] == told[19] == {"a": 0.5, "b": 0.0, "c": 0.25, "d": 0.25}
    assert told[20] == told[23] == {"b": 0.0, "c": 0.5, "d": 0.5}


def _by_hand(decision: Decision, command: str) -> Decision:
    decision.data["command"] = command
    return decision
