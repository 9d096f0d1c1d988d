"""`max_epochs`: no document is seen more often, the others take the share over, and the stream stays elastic."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_corpus import jsonl, make_documents

from data_scheduler import DataConfig, Scheduler, batch_sha256, merge_states
from data_scheduler.replay import ledger, replay
from headrace.errors import ConfigError, DataError

Make = Callable[..., DataConfig]
STEPS = 140


@pytest.fixture(scope="module")
def capped(data_config: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Two small sources, seen twice and once at most, and a large one."""
    root = tmp_path_factory.mktemp("capped")
    for name, count in (("small", 120), ("once", 400), ("large", 3000)):
        (root / f"{name}.jsonl").write_bytes(jsonl(make_documents(name, count, 0)))

    def make(**changes: Any) -> DataConfig:
        sources = [
            {"name": name, "paths": [str(root / f"{name}.jsonl")], "weight": weight, "max_epochs": limit}
            for name, weight, limit in (("small", 0.4, 2), ("once", 0.1, 1), ("large", 0.5, None))
        ]
        return data_config(**{"sources": sources, "lanes": 12, "global_batch_size": 12, "chunk_bytes": 2048} | changes)

    return make


def train(
    config: DataConfig, steps: int, dp: int = 1, state: Mapping[str, Any] | None = None, run_dir: Path | None = None
) -> tuple[list[str], list[list[int]], Any]:
    """Steps as a trainer takes them, reporting exhausted sources: (hashes, sequences per source, merged state)."""
    ranks = [Scheduler(config, dp_rank=rank, dp_size=dp, run_dir=run_dir if rank == 0 else None) for rank in range(dp)]
    if run_dir is not None and dp > 1:
        ranks[1:] = [Scheduler(config, dp_rank=rank, dp_size=dp, run_dir=run_dir) for rank in range(1, dp)]
    for rank in ranks:
        if state is not None:
            rank.load_state_dict(state)
    hashes, drawn = [], []
    for _ in range(steps):
        batches = [next(rank) for rank in ranks]
        digests = dict(pair for batch in batches for pair in zip(batch.slots.tolist(), batch.digests, strict=True))
        hashes.append(batch_sha256([digests[slot] for slot in range(len(digests))]))
        drawn.append(sum(np.bincount(batch.source_ids, minlength=3) for batch in batches).tolist())
        through = np.logical_and.reduce([batch.exhausted for batch in batches])
        names: Iterable[str] = [name for name, done in zip(ranks[0].names, through, strict=True) if done]
        for rank in ranks:
            rank.feedback(batches[0].step, {}, {}, names)
    merged = merge_states([rank.state_dict() for rank in ranks])
    for rank in ranks:
        rank.close()
    return hashes, drawn, merged


def test_shares_go_to_the_others_and_the_journal_says_when(capped: Make, tmp_path: Path) -> None:
    hashes, drawn, _ = train(capped(), STEPS, run_dir=tmp_path)
    scheduler = Scheduler(capped(), run_dir=tmp_path)
    events = {event.data["source"]: event for event in scheduler.journal.of("capped")}
    assert set(events) == {"small", "once"}
    for number, name in enumerate(("small", "once")):
        event = events[name]
        assert event.step == event.data["reported"] + capped().policy.horizon
        assert sum(row[number] for row in drawn[event.data["reported"] + 1 :]) == 0
    assert all(row == [0, 0, 12] for row in drawn[max(event.step for event in events.values()) :])
    assert events["small"].step < events["once"].step
    assert drawn[0] == [5, 1, 6]
    assert [2, 10] in [row[1:] for row in drawn[events["small"].step : events["small"].step + 4]]  # 0.1 : 0.5
    again = [batch_sha256(batch.digests) for batch in replay(tmp_path, 0, STEPS - 1)]
    assert again == hashes
    _, rows = ledger(tmp_path, STEPS)
    seen = {row.source: row.documents_seen for row in rows}
    assert len(seen["small"]) <= 3
    assert len(seen["once"]) <= 2


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_no_document_is_seen_more_often(capped: Make, packing: str) -> None:
    config = capped(packing=packing)
    scheduler = Scheduler(config)
    begun: list[Counter[int]] = [Counter() for _ in range(3)]
    for _ in range(STEPS):
        batch = next(scheduler)
        for row, source in enumerate(batch.source_ids.tolist()):
            for document, offset in zip(batch.segment_ids[row].tolist(), batch.offsets[row].tolist(), strict=True):
                begun[source][document] += offset == 0
    assert max(begun[0].values()) == 2
    assert max(begun[1].values()) == 1
    assert len(begun[1]) > 300  # most of its 400: each of 12 lanes keeps less than a sequence back


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["split", "best_fit"]),
    st.lists(st.tuples(st.integers(1, 25), st.sampled_from([1, 2, 3, 4, 6]), st.integers(0, 3)), max_size=4),
)
def test_stops_and_world_sizes_do_not_matter(
    capped: Make, tmp_path_factory: pytest.TempPathFactory, packing: str, parts: list[tuple[int, int, int]]
) -> None:
    expected, _, _ = train(capped(packing=packing), STEPS)
    hashes: list[str] = []
    state = None
    run_dir = tmp_path_factory.mktemp("run")
    for steps, dp, prefetch in [*parts, (STEPS, 1, 0)]:
        steps = min(steps, STEPS - len(hashes))
        more, _, state = train(capped(packing=packing, prefetch=prefetch), steps, dp, state, run_dir)
        hashes += more
    assert hashes == expected


def test_a_raised_limit_lets_a_source_go_on(capped: Make, tmp_path: Path) -> None:
    _, drawn, state = train(capped(), STEPS, run_dir=tmp_path)
    assert drawn[-1] == [0, 0, 12]
    sources = [source.model_copy(update={"max_epochs": 9}) for source in capped().sources]
    more = capped().model_copy(update={"sources": sources})
    _, drawn, _ = train(more, 5, state=state, run_dir=tmp_path)
    assert drawn[0][0] >= 4


def test_when_everything_was_seen_the_run_says_so(capped: Make) -> None:
    sources = [source.model_copy(update={"max_epochs": 1}) for source in capped().sources[:2]]
    scheduler = Scheduler(capped().model_copy(update={"sources": sources}))
    with pytest.raises(DataError, match="every source with a weight has been seen max_epochs times"):
        for _ in range(200):
            next(scheduler)


def test_the_horizon_must_pass_prefetch(capped: Make) -> None:
    with pytest.raises(ConfigError, match="horizon"):
        Scheduler(capped(prefetch=7))  # 7 steps ready, one in the making, the limit from the 8th on
    Scheduler(capped(prefetch=6)).close()
