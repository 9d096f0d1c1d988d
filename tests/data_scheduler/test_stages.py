"""Stages: no token is lost or seen twice where the batch shape changes, and every count of tokens is exact."""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from staged_runs import CURRICULUM, LANES, STEPS, Make, counts, staged

from data_scheduler import DataConfig, Journal, Scheduler, batch_sha256, merge_states
from data_scheduler.batch import Batch
from data_scheduler.control import Decision
from data_scheduler.dry_run import DryRun
from data_scheduler.lane import LaneStream, Position
from data_scheduler.manifest import Manifest
from data_scheduler.order import Int64, lanes_of
from data_scheduler.plan import Plan
from data_scheduler.replay import ledger, replay, trace
from data_scheduler.simulate import Volume, simulate
from data_scheduler.stages import tokens_before, turns
from data_scheduler.state import Snapshots
from data_scheduler.timeline import Timeline
from data_scheduler.token_estimate import TokenEstimate
from headrace.errors import LayoutError

Shape = tuple[int, int]


def expected_shapes(seq_len: int, batch: int, stages: list[dict[str, Any]], steps: int) -> list[Shape]:
    """(seq_len, global batch size) of every step, by asking at each step anew how far the run has come."""
    shapes: list[Shape] = []
    given = 0
    for step in range(steps):
        length, size = seq_len, batch
        for stage in stages:
            ((unit, begin),) = ((key, stage[key]) for key in stage if key.startswith("from_"))
            reached = {"from_step": step, "from_tokens": given, "from_share": step / steps}[unit]
            if reached < begin:
                break
            length, size = stage.get("seq_len", length), stage.get("global_batch_size", size)
            ramp = stage.get("batch_ramp")
            if ramp:
                times = 0
                while size < ramp["to"] and reached >= begin + times * ramp["every"]:
                    size = size * ramp["multiply"] if "multiply" in ramp else size + ramp["add"]
                    times += 1
        shapes.append((length, size))
        given += length * size
    return shapes


@st.composite
def stage_lists(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Up to four stages; batches are multiples of 6."""
    unit = draw(st.sampled_from(["from_step", "from_tokens", "from_share"]))
    most = {"from_step": STEPS - 1, "from_tokens": 12_000, "from_share": 90}[unit]
    begins = sorted(draw(st.sets(st.integers(0, most), max_size=4)))
    stages: list[dict[str, Any]] = []
    size = 6
    for number, begin in enumerate(begins):
        stage: dict[str, Any] = {unit: begin / 100 if unit == "from_share" else begin}
        if draw(st.booleans()):
            stage["seq_len"] = draw(st.sampled_from([16, 33, 64]))
        how = draw(st.sampled_from(["same", "size", "ramp"]))
        if how == "size":
            stage["global_batch_size"] = size = draw(st.sampled_from([6, 12, 24]))
        elif how == "ramp" and size < 24:
            growth = draw(st.sampled_from([{"add": 6}, {"multiply": 2}]))
            to = draw(st.sampled_from([size + 6, 24])) if "add" in growth else 24
            times = (to - size) // 6 if "add" in growth else {6: 2, 12: 1, 18: 0}[size]
            room = (begins[number + 1] if number + 1 < len(begins) else most + 1) - begin
            every = room // max(1, times)
            if times and every:
                unit_every = every / 100 if unit == "from_share" else every
                stage["batch_ramp"] = {"to": to, "every": unit_every, **growth}
                size = to
        stages.append(stage)
    return stages


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stages=stage_lists(), at=st.integers(0, STEPS - 1))
def test_turns_are_where_each_step_by_itself_would_have_them(
    data_config: Make, stages: list[dict[str, Any]], at: int
) -> None:
    config = data_config(seq_len=32, global_batch_size=6, lanes=LANES, stages=stages)
    expected = expected_shapes(32, 6, stages, STEPS)

    def by_step(found: list[Any]) -> list[Shape]:
        return [
            next((t.seq_len, t.global_batch_size) for t in reversed(found) if t.step <= step)
            for step in range(found[0].step, STEPS)
        ]

    whole = turns(config, STEPS, Timeline())
    assert by_step(whole) == expected
    assert [turn.step for turn in whole] == sorted({turn.step for turn in whole})
    # A run that goes on at some step, from the journal of what was, has the same ahead of it.
    journal = Journal()
    for turn in whole:
        journal.append("stage", turn.step, turn.data, "config")
    plan = Plan(journal)
    assert by_step(turns(config, STEPS, plan.shape, at)) == expected[at:]
    assert tokens_before(plan.shape, at) == sum(length * size for length, size in expected[:at])


# -- tokens ----------------------------------------------------------------------------------------------------------


class Trained:
    """What a run gave, (lane, source) by (lane, source)."""

    def __init__(self) -> None:
        self.hashes: list[str] = []
        self.shapes: list[Shape] = []
        self.tokens: dict[tuple[int, int], list[Int64]] = {}
        self.places: dict[tuple[int, int], list[Int64]] = {}
        """[tokens, 2]: document and place in it."""
        self.sequences = 0

    def take(self, parts: list[Batch]) -> None:
        rows = {
            slot: (batch, row) for batch in parts for row, slot in enumerate(batch.slots.tolist())
        }  # all ranks' rows
        size = len(rows)
        lanes = lanes_of(self.sequences, size, LANES)
        self.hashes.append(batch_sha256([rows[slot][0].digests[rows[slot][1]] for slot in range(size)]))
        self.shapes.append((parts[0].tokens.shape[1] - 1, size))
        for slot in range(size):
            batch, row = rows[slot]
            key = int(lanes[slot]), int(batch.source_ids[row])
            self.tokens.setdefault(key, []).append(batch.tokens[row].copy())
            self.places.setdefault(key, []).append(
                places(batch.starts[row], batch.segment_ids[row], batch.offsets[row], batch.tokens.shape[1])
            )
        self.sequences += size


def places(starts: Any, ids: Any, offsets: Any, width: int) -> Int64:
    lengths = np.diff(np.append(starts, width))
    begin = np.repeat(offsets - starts, lengths)
    return np.stack([np.repeat(ids, lengths), begin + np.arange(width)], axis=1)


def train(make: Callable[[int], DataConfig], parts: list[tuple[int, int]], run_dir: Path) -> tuple[Trained, Scheduler]:
    """STEPS steps in `parts` of (steps, data-parallel size), then the rest on one rank; the last scheduler, open."""
    trained, state = Trained(), None
    for steps, dp in [*parts, (STEPS, 1)]:
        count = min(steps, STEPS - len(trained.hashes))
        ranks = [
            Scheduler(make(rank), dp_rank=rank, dp_size=dp, run_dir=run_dir, run_steps=STEPS) for rank in range(dp)
        ]
        for rank in ranks:
            if state is not None:
                rank.load_state_dict(state)
        for _ in range(count):
            trained.take([next(rank) for rank in ranks])
        state = merge_states([rank.state_dict() for rank in ranks])
        for rank in ranks:
            rank.close()
        if len(trained.hashes) == STEPS:
            break
    return trained, ranks[0]


def cells(found: Int64) -> Counter[tuple[int, int]]:
    return Counter(map(tuple, found.tolist()))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stages=stage_lists(),
    packing=st.sampled_from(["split", "best_fit"]),
    parts=st.lists(st.tuples(st.integers(1, 6), st.sampled_from([1, 2, 3, 6])), max_size=3),
    prefetch=st.integers(0, 3),
)
def test_no_token_is_lost_or_repeated_at_a_boundary(
    data_config: Make,
    tmp_path_factory: pytest.TempPathFactory,
    stages: list[dict[str, Any]],
    packing: str,
    parts: list[tuple[int, int]],
    prefetch: int,
) -> None:
    def make(rank: int) -> DataConfig:
        return data_config(
            seq_len=32, global_batch_size=6, lanes=LANES, stages=stages, packing=packing, prefetch=prefetch
        )

    folder = tmp_path_factory.mktemp("run")
    whole, scheduler = train(make, [], folder / "whole")
    # The tokens that were given are those that were planned.
    assert whole.shapes == expected_shapes(32, 6, stages, STEPS)
    trained = sum(length * size for length, size in whole.shapes)
    assert tokens_before(scheduler.plan.shape, STEPS) == trained
    read = sum((length + 1) * size for length, size in whole.shapes)
    assert sum(len(row) for rows in whole.tokens.values() for row in rows) == read
    assert int(np.asarray(scheduler.state_dict()["given"])[:, :, 1].sum()) == read
    # What each lane gave of a source is the source's stream from its beginning, cut wherever.
    for (lane, source), rows in whole.tokens.items():
        tokens, found = np.concatenate(rows), np.concatenate(whole.places[lane, source])
        carry = scheduler.place(lane, source)[1]
        before = len(tokens) - carry.taken
        """Tokens before the packer's open window: all of them were given."""
        window = carry.bins * carry.width - carry.head
        stream = LaneStream(scheduler.readers[source], lane, Position())
        once = np.empty(before + window, np.int64)
        segments = stream.take(once)
        laid = places(segments.starts, segments.document_ids, segments.offsets, len(once))
        value = dict(zip(map(tuple, laid.tolist()), once.tolist(), strict=True))
        assert [value[place] for place in map(tuple, found.tolist())] == tokens.tolist()
        given = cells(found)
        assert cells(laid[:before]) <= given
        assert given <= cells(laid)
        if packing == "split":
            assert tokens.tolist() == once.tolist()
    # Stopped and gone on with other numbers of ranks: the same batches.
    stopped, _ = train(make, parts, folder / "stopped")
    assert stopped.hashes == whole.hashes
    scheduler.close()


# -- the journal -----------------------------------------------------------------------------------------------------


def test_stages_are_journaled_at_the_start_and_weights_hold_from_their_step(data_config: Make, tmp_path: Path) -> None:
    scheduler = Scheduler(staged(data_config), run_dir=tmp_path)
    first = counts(scheduler, 1)
    events = [(e.kind, e.step, e.by, e.data) for e in scheduler.journal.events if e.kind in ("stage", "policy")]
    base = {"kind": "static", "options": {}}
    assert events == [
        ("stage", 0, "config", {"seq_len": 32, "global_batch_size": 6}),
        ("stage", 4, "config", {"seq_len": 128, "global_batch_size": 6, "stage": 0}),
        ("stage", 8, "config", {"seq_len": 128, "global_batch_size": 12, "stage": 1}),
        ("stage", 10, "config", {"seq_len": 128, "global_batch_size": 24, "stage": 1}),
        ("stage", 12, "config", {"seq_len": 128, "global_batch_size": 24, "stage": 2}),
        ("policy", 4, "config", base | {"weights": {"a": 1.0, "b": 0.0, "c": 0.0, "d": 3.0}, "stage": 0}),
        ("policy", 12, "config", base | {"weights": {"a": 0.0, "b": 0.0, "c": 1.0, "d": 0.0}, "stage": 2}),
    ]
    drawn = np.array(first + counts(scheduler, 13))
    assert drawn.sum(axis=1).tolist() == [6] * 8 + [12] * 2 + [24] * 4
    assert drawn[:4].sum(axis=0).tolist() == pytest.approx([9.6, 7.2, 4.8, 2.4], abs=1)
    # What a source was still owed when its weight ended is given: less than one sequence of each.
    assert drawn[4:12].sum(axis=0).tolist() == pytest.approx([24, 0, 0, 72], abs=1)
    assert drawn[12:].sum(axis=0).tolist() == pytest.approx([0, 0, 48, 0], abs=1)
    mixture = [(e.step, e.data["weights"]) for e in scheduler.journal.of("mixture")]
    assert [step for step, _ in mixture] == [0, 4, 12]
    assert mixture[1][1] == {"a": 0.25, "b": 0.0, "c": 0.0, "d": 0.75}
    scheduler.close()


def test_replay_trace_ledger_and_simulation_agree_with_the_run(data_config: Make, tmp_path: Path) -> None:
    config = staged(data_config)
    scheduler = Scheduler(config, run_dir=tmp_path)
    hashes, drawn, read = [], [], 0
    for _ in range(STEPS):
        batch = next(scheduler)
        hashes.append(batch_sha256(batch.digests))
        drawn.append(np.bincount(batch.source_ids, minlength=4).tolist())
        read += batch.tokens.size
    Snapshots(tmp_path).save(scheduler.state_dict())
    scheduler.close()
    assert [batch_sha256(batch.digests) for batch in replay(tmp_path, 0, STEPS - 1)] == hashes
    assert sum(document.token_stop - document.token_start for document in trace(tmp_path, 11)) == 24 * 129
    at, rows = ledger(tmp_path)
    assert at == STEPS
    assert sum(row.tokens for row in rows) == read
    shapes = [(32, 6)] * 4 + [(128, 6)] * 4 + [(128, 12)] * 2 + [(128, 24)] * 4
    asked = np.zeros(4)
    for step, (length, size) in enumerate(shapes):
        share = [0.4, 0.3, 0.2, 0.1] if step < 4 else [0.25, 0, 0, 0.75] if step < 12 else [0, 0, 1, 0]
        asked += np.array(share) * (length + 1) * size
    assert [row.share_asked for row in rows] == pytest.approx(asked / read)
    assert [row.share_realised for row in rows] == pytest.approx([row.tokens / read for row in rows])
    dry = iter(DryRun(config, run_steps=STEPS))
    assert [next(dry).counts.tolist() for _ in range(STEPS)] == drawn
    volumes = [Volume(TokenEstimate(name, 10**9, 1e6, 0.0, 4.0, 1000, "given")) for name in "abcd"]
    simulation = simulate(config, volumes, STEPS)
    assert [(s.sequences, s.tokens) for s in simulation.sources] == [(row.sequences, row.tokens) for row in rows]
    assert [s.share_asked for s in simulation.sources] == pytest.approx([row.share_asked for row in rows])
    assert [s.epochs for s in simulation.sources] == pytest.approx([row.tokens / 1e6 for row in rows])
    assert simulation.said_shape == "6 x 32 to 24 x 128"


def test_a_changed_list_changes_the_future_only(data_config: Make, tmp_path: Path) -> None:
    first = Scheduler(staged(data_config), run_dir=tmp_path)
    counts(first, 6)
    later = [CURRICULUM[0], {"from_step": 7, "seq_len": 48, "weights": {"b": 1.0}}]
    again = Scheduler(staged(data_config, stages=later), run_dir=tmp_path)
    again.load_state_dict(first.state_dict())
    drawn = counts(again, 4)
    assert [again.plan.shape.at(step)["seq_len"] for step in (3, 5, 6, 7, 20)] == [32, 128, 128, 48, 48]
    assert tokens_before(again.plan.shape, 10) == 4 * 6 * 32 + 3 * 6 * 128 + 3 * 6 * 48
    assert np.sum(drawn[1:], axis=0).tolist() == pytest.approx([0, 18, 0, 0], abs=1)
    # By tokens: those of the true past count, not what the new list would have given.
    by_tokens = [{"from_tokens": 4 * 6 * 32 + 3 * 6 * 128 + 3 * 6 * 48 + 2 * 6 * 32 - 1, "seq_len": 64}]
    once_more = Scheduler(staged(data_config, stages=by_tokens), run_dir=tmp_path)
    once_more.load_state_dict(again.state_dict())
    next(once_more)
    assert [once_more.plan.shape.at(step)["seq_len"] for step in (6, 9, 10, 11, 12)] == [128, 48, 32, 32, 64]
    for scheduler in (first, again, once_more):
        scheduler.close()


def test_what_a_person_set_for_the_first_step_of_a_stage_outlives_a_restart(data_config: Make, tmp_path: Path) -> None:
    def go(stops: list[int], folder: Path) -> list[list[int]]:
        drawn: list[list[int]] = []
        state: Mapping[str, Any] | None = None
        for steps in [*stops, STEPS - sum(stops)]:
            scheduler = Scheduler(staged(data_config, prefetch=0), run_dir=folder)
            if state is not None:
                scheduler.load_state_dict(state)
            if not drawn:
                drawn += counts(scheduler, 1)
                steps -= 1
                # For the first step of a stage it holds; from the next stage with weights on it does not.
                event = scheduler.journal.append("mixture", 4, {"weights": {"b": 1.0}}, "user:ada")
                scheduler.plan.apply(event)
            drawn += counts(scheduler, steps)
            state = scheduler.state_dict()
            scheduler.close()
        return drawn

    whole = go([], tmp_path / "whole")
    assert np.sum(whole[4:12], axis=0).tolist() == pytest.approx([0, 96, 0, 0], abs=1)
    assert np.sum(whole[12:], axis=0).tolist() == pytest.approx([0, 0, 48, 0], abs=1)
    for stops in ([4], [3], [2, 4, 6]):
        assert go(stops, tmp_path / str(len(stops)) / str(stops[0])) == whole


def test_more_ranks_once_the_batch_has_grown(data_config: Make, tmp_path: Path) -> None:
    config = staged(data_config)
    with pytest.raises(LayoutError, match=r"of every stage \(6, 12, 24\); nearest that do: 2, 3, 6"):
        Scheduler(config, dp_size=12)
    first = Scheduler(config, run_dir=tmp_path / "few")
    counts(first, 7)
    few = Scheduler(config, dp_size=12, dp_rank=0, run_dir=tmp_path / "few")
    few.load_state_dict(first.state_dict())
    with pytest.raises(LayoutError, match="of every stage"):
        next(few)
    trained = Trained()
    ranks: list[Scheduler] = [Scheduler(config, run_dir=tmp_path / "run")]
    for step in range(STEPS):
        if step == 9:  # after 8 · 6 + 12 sequences; 12 ranks
            state = ranks[0].state_dict()
            ranks[0].close()
            ranks = [Scheduler(config, dp_rank=rank, dp_size=12, run_dir=tmp_path / "run") for rank in range(12)]
            for rank in ranks:
                rank.load_state_dict(state)
        trained.take([next(rank) for rank in ranks])
    assert trained.hashes == [batch_sha256(b.digests) for b in replay(tmp_path / "run", 0, STEPS - 1)]
    for rank in (*ranks, first, few):
        rank.close()


def test_a_source_that_a_person_added_keeps_its_weight_in_later_stages(data_config: Make, tmp_path: Path) -> None:
    """Going on from the journal, and going on after a restart, at any step."""
    *known, joining = staged(data_config).sources
    joining = joining.model_copy(update={"weight": 0.5})
    stages = [{"from_step": 8, "weights": {"a": 1.0}}]

    def go(stop: int, folder: Path) -> list[list[int]]:
        config = staged(data_config, prefetch=0, sources=[source.model_dump() for source in known], stages=stages)
        scheduler = Scheduler(config, run_dir=folder)
        drawn = counts(scheduler, 3)
        scheduler.take(Decision("manifest", 3, Manifest.take(joining).to_data()), "system")
        added = {"source": joining.model_dump(mode="json"), "command": "1"}
        scheduler.take(Decision("source_added", 3, added), "user:ada")
        scheduler = scheduler.with_source(joining)
        drawn += counts(scheduler, stop - 3)
        state = scheduler.state_dict()
        scheduler.close()
        again = Scheduler(config.model_copy(update={"sources": [*known, joining]}), run_dir=folder)
        again.load_state_dict(state)
        drawn += counts(again, STEPS - stop)
        again.close()
        return drawn

    whole = go(STEPS, tmp_path / "whole")
    assert np.sum(whole[8:], axis=0).tolist() == pytest.approx([24, 0, 0, 12], abs=1)
    assert go(5, tmp_path / "before") == whole
    assert go(8, tmp_path / "at") == whole
    assert go(10, tmp_path / "after") == whole
