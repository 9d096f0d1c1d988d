"""`watch`: new files join at a journaled step, the same for every world size, and nothing before them changes."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_corpus import jsonl, make_documents

from data_scheduler import DataConfig, Journal, Scheduler, batch_sha256, merge_states
from data_scheduler.replay import ledger, replay, trace
from data_scheduler.state import Snapshots
from headrace.errors import ConfigError

Make = Callable[..., DataConfig]
STEPS = 60


@pytest.fixture
def growing(data_config: Make, tmp_path: Path) -> Make:
    """A watched source of one file, in `tmp_path / "in"`, looked at every 5 steps."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.jsonl").write_bytes(jsonl(make_documents("old", 200, 0)))

    def make(**changes: Any) -> DataConfig:
        source = {"name": "s", "paths": [str(tmp_path / "in")], "watch": True, "max_epochs": changes.pop("limit", None)}
        other = {"name": "t", "paths": [str(tmp_path / "other.jsonl")]}
        (tmp_path / "other.jsonl").write_bytes(jsonl(make_documents("other", 900, 0)))
        settled = {
            "lanes": 12,
            "global_batch_size": 12,
            "chunk_bytes": 2048,
            "watch_every": 5,
            "policy": {"horizon": 6},
        }
        return data_config(**{"sources": [source, other], **settled, **changes})

    return make


def add(folder: Path, name: str, count: int = 60) -> None:
    partial = folder / f".{name}"
    partial.write_bytes(jsonl(make_documents(name, count, 0)))
    partial.rename(folder / f"{name}.jsonl")


def go(
    config: DataConfig,
    run_dir: Path,
    parts: list[tuple[int, int]],
    arrivals: dict[int, str] | None = None,
    folder: Path | None = None,
) -> list[str]:
    """Steps in parts of (steps, world size); rank 0 looks for files, all ranks hear of them. Files arrive at steps."""
    hashes: list[str] = []
    state = None
    for steps, dp in parts:
        ranks = [Scheduler(config, dp_rank=rank, dp_size=dp, run_dir=run_dir, watch=False) for rank in range(dp)]
        for rank in ranks:
            if state is not None:
                rank.load_state_dict(state)
        for _ in range(steps):
            if arrivals and folder and len(hashes) in arrivals:
                add(folder, arrivals[len(hashes)])
            batches = [next(rank) for rank in ranks]
            digests = dict(pair for batch in batches for pair in zip(batch.slots.tolist(), batch.digests, strict=True))
            hashes.append(batch_sha256([digests[slot] for slot in range(len(digests))]))
            through = np.logical_and.reduce([batch.exhausted for batch in batches])
            for rank in ranks:
                rank.feedback(batches[0].step, {}, {}, [n for n, t in zip(rank.names, through, strict=True) if t])
            if ranks[0].is_time_to_look:
                found = ranks[0].new_files()
                for rank in ranks:
                    rank.grow(found)
        state = merge_states([rank.state_dict() for rank in ranks])
        Snapshots(run_dir).save(state)
        for rank in ranks:
            rank.close()
    return hashes


@pytest.mark.parametrize("packing", ["split", "best_fit"])
@settings(deadline=None, max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cuts=st.lists(st.tuples(st.integers(1, 30), st.sampled_from([1, 2, 3, 4, 6])), max_size=4),
    limit=st.sampled_from([None, 1, 2]),
)
def test_a_grown_stream_is_the_same_after_stops_and_for_every_world_size(
    growing: Make,
    tmp_path_factory: pytest.TempPathFactory,
    packing: str,
    cuts: list[tuple[int, int]],
    limit: int | None,
) -> None:
    """Once the journal says when files joined, the rest follows: every other run with that journal is the same."""
    config = growing(packing=packing, limit=limit)
    folder = Path(config.sources[0].paths[0])
    for path in folder.glob("new*"):
        path.unlink()
    first = tmp_path_factory.mktemp("first")
    expected = go(config, first, [(STEPS, 1)], {7: "new-a", 23: "new-b"}, folder)
    grown = [event for event in Journal(first / "journal.jsonl", writable=False).events if event.kind == "grown"]
    assert [event.data["reported"] for event in grown] == [14, 29]
    assert [event.step for event in grown] == [20, 35]
    parts, left = [], STEPS
    for steps, dp in cuts:
        steps = min(steps, left)
        parts, left = [*parts, (steps, dp)], left - steps
    assert [batch_sha256(batch.digests) for batch in replay(first, 0, STEPS - 1)] == expected
    # The same arrivals seen by other world sizes, with stops; files are there from the start of the steps they had.
    for path in folder.glob("new*"):
        path.unlink()
    second = tmp_path_factory.mktemp("second")
    again = go(config, second, [part for part in [*parts, (left, 1)] if part[0]], {7: "new-a", 23: "new-b"}, folder)
    if [event.step for event in Journal(second / "journal.jsonl", writable=False).of("grown")] == [20, 35]:
        assert again == expected  # a stop between two looks can only make a file wait for another
    else:
        assert again[:20] == expected[:20]
    assert [batch_sha256(batch.digests) for batch in replay(second, 0, STEPS - 1)] == again


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_new_documents_are_given_and_named(growing: Make, tmp_path: Path, packing: str) -> None:
    config = growing(packing=packing)
    run = tmp_path / "run"
    go(config, run, [(STEPS, 2)], {3: "new-a", 12: "new-b"}, tmp_path / "in")
    files = Counter(document.file for step in range(STEPS) for document in trace(run, step))
    assert {Path(file).name for file in files} >= {"0.jsonl", "new-a.jsonl", "new-b.jsonl"}
    joined = {Path(document.file).name for step in range(16) for document in trace(run, step)}
    assert "new-b.jsonl" not in joined


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_the_ledger_counts_what_joined_late(growing: Make, tmp_path: Path, packing: str) -> None:
    """Counted independently: every (document, epoch) of which a token is in some batch."""
    config = growing(packing=packing)
    run = tmp_path / "run"
    go(config, run, [(25, 1), (STEPS, 3)], {3: "new-a", 42: "new-b"}, tmp_path / "in")
    steps = 25 + STEPS
    begun: Counter[int] = Counter()
    seen: Counter[int] = Counter()
    for batch in replay(run, 0, steps - 1):
        for row in np.flatnonzero(batch.source_ids == 0):
            for document, offset in zip(batch.segment_ids[row].tolist(), batch.offsets[row].tolist(), strict=True):
                seen[document] += 1
                begun[document] += offset == 0
    at, rows = ledger(run, steps)
    assert at == steps
    counts = rows[0].documents_seen
    # A document is begun once an epoch; best_fit may give a later piece of it before its beginning.
    by_times = Counter(begun[document] for document in seen)
    assert sum(counts[1:]) == len(seen)
    if packing == "split":
        assert {times: count for times, count in enumerate(counts) if times and count} == dict(by_times)
    assert sum(counts) == 200 + 60 + 60


def test_with_max_epochs_one_every_new_document_is_given_once(growing: Make, tmp_path: Path) -> None:
    """The way to train on what arrives: a source that is through takes up again when files join."""
    config = growing(limit=1)
    run = tmp_path / "run"
    go(config, run, [(120, 1)], {60: "new-a"}, tmp_path / "in")
    journal = Journal(run / "journal.jsonl", writable=False)
    capped = [(event.step, event.data["generations"]) for event in journal.of("capped") if event.data["source"] == "s"]
    assert [generations for _, generations in capped] == [1, 2]
    begun: Counter[int] = Counter()
    for batch in replay(run, 0, 119):
        for row in np.flatnonzero(batch.source_ids == 0):
            for document, offset in zip(batch.segment_ids[row].tolist(), batch.offsets[row].tolist(), strict=True):
                begun[document] += offset == 0
    assert max(begun.values()) == 1
    assert len(begun) > 200 + 60 - 40  # each lane keeps less than a sequence back


def test_a_file_that_is_being_written_waits(growing: Make, tmp_path: Path) -> None:
    scheduler = Scheduler(growing())
    path = tmp_path / "in" / "slow.jsonl"
    for length in (1, 2, 3):
        path.write_bytes(jsonl(["still being written"] * length))
        assert scheduler.new_files() == {}
    assert [entry[0] for _, entries in scheduler.new_files()["s"]["folders"] for entry in entries] == ["slow.jsonl"]


def test_one_rank_looks_by_itself(growing: Make, tmp_path: Path) -> None:
    scheduler = Scheduler(growing(prefetch=2), run_dir=tmp_path / "run")
    next(scheduler)
    add(tmp_path / "in", "new-a")
    for _ in range(20):
        next(scheduler)
    scheduler.close()
    assert [event.step for event in scheduler.journal.of("grown")] == [15]


def test_the_horizon_must_pass_prefetch(growing: Make) -> None:
    with pytest.raises(ConfigError, match="horizon"):
        Scheduler(growing(prefetch=5))
    Scheduler(growing(prefetch=4)).close()
