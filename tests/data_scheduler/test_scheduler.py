"""The contract: the token stream does not depend on world size, prefetch, or where the run was stopped."""

import gc
import json
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_corpus import jsonl

from data_scheduler import DataConfig, Journal, Scheduler, batch_sha256, merge_states
from data_scheduler.state import load_state, save_state
from headrace.errors import CheckpointError, ConfigError, DataError, LayoutError

Make = Callable[..., DataConfig]
STEPS = 30


def run(config: DataConfig, steps: int, dp: int = 1, state: Mapping[str, Any] | None = None) -> tuple[list[str], Any]:
    """(hash of every global batch, merged state) of `steps` steps on `dp` ranks."""
    ranks = [Scheduler(config, dp_rank=rank, dp_size=dp) for rank in range(dp)]
    for rank in ranks:
        if state is not None:
            rank.load_state_dict(state)
    hashes = []
    for _ in range(steps):
        digests: dict[int, bytes] = {}
        for rank in ranks:
            batch = next(rank)
            digests.update(zip(batch.slots.tolist(), batch.digests, strict=True))
        hashes.append(batch_sha256([digests[slot] for slot in range(len(digests))]))
    merged = merge_states([rank.state_dict() for rank in ranks])
    for rank in ranks:
        rank.close()
    return hashes, merged


@pytest.fixture(scope="module")
def uninterrupted(data_config: Make) -> list[str]:
    return run(data_config(), STEPS)[0]


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.integers(1, 8), st.sampled_from([1, 2, 3, 4, 6, 8]), st.integers(0, 4)), min_size=1, max_size=6
    )
)
def test_any_stops_and_world_sizes_give_the_same_stream(
    data_config: Make, uninterrupted: list[str], parts: list[tuple[int, int, int]]
) -> None:
    hashes: list[str] = []
    state = None
    for steps, dp, prefetch in parts:
        steps = min(steps, STEPS - len(hashes))
        more, state = run(data_config(prefetch=prefetch), steps, dp, state)
        hashes += more
    assert hashes == uninterrupted[: len(hashes)]


def test_another_seed_gives_another_stream(data_config: Make, uninterrupted: list[str]) -> None:
    assert not set(run(data_config(seed=1), 5)[0]) & set(uninterrupted)


def test_state_survives_a_file(data_config: Make, uninterrupted: list[str], tmp_path: Path) -> None:
    _, state = run(data_config(), 11, dp=4)
    save_state(tmp_path / "s.npz", state)
    assert run(data_config(), 5, dp=3, state=load_state(tmp_path / "s.npz"))[0] == uninterrupted[11:16]
    data = (tmp_path / "s.npz").read_bytes()
    (tmp_path / "s.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="not a readable data state"):
        load_state(tmp_path / "s.npz")


def test_state_is_small_and_does_not_grow(data_config: Make) -> None:
    config = data_config()
    scheduler = Scheduler(config)
    next(scheduler)
    early = scheduler.state_dict()
    for _ in range(60):
        next(scheduler)
    late = scheduler.state_dict()
    assert late["positions"].nbytes == early["positions"].nbytes
    assert late["positions"].nbytes <= 64 * config.lanes * len(config.sources)


def test_every_document_once_an_epoch(data_config: Make, corpus: Path) -> None:
    """Each lane's walk through an epoch, all lanes together, is the source: none missed, none twice."""
    scheduler = Scheduler(data_config())
    for reader, name in zip(scheduler.readers, "abcd", strict=True):
        for epoch in (0, 1):
            texts = Counter(
                text
                for lane in range(24)
                for chunk in reader.hand(epoch, lane).tolist()
                for text in reader.documents(chunk, epoch)[0]
            )
            expected = {"a": 300, "b": 180, "c": 150, "d": 200}[name]
            assert sum(texts.values()) == expected
            assert all(text.startswith(f"{name}-") for text in texts)
        orders = [reader.documents(int(reader.hand(0, 0)[0]), epoch)[0] for epoch in (0, 1)]
        assert orders[0] != orders[1] or len(orders[0]) < 3


def test_sequences_hold_one_source_and_shares_are_kept(data_config: Make) -> None:
    scheduler = Scheduler(data_config())
    drawn = np.zeros(4)
    for step in range(1, 40):
        batch = next(scheduler)
        drawn += np.bincount(batch.source_ids, minlength=4)
        assert (np.abs(drawn - np.array([0.4, 0.3, 0.2, 0.1]) * 24 * step) < 1 + 1e-6).all()
        for row in range(24):
            text = scheduler.encoder.decode(batch.tokens[row].tolist())
            name = "abcd"[batch.source_ids[row]]
            others = set("abcd") - {name}
            assert not any(f" {other}-" in text or text.startswith(f"{other}-") for other in others)


def test_batch_fields_agree(data_config: Make) -> None:
    batch = next(Scheduler(data_config()))
    assert batch.tokens.shape == (24, 65)
    lengths = np.diff(batch.cu_seqlens)
    assert (lengths > 0).all()
    assert batch.cu_seqlens[0] == 0
    assert batch.cu_seqlens[-1] == 24 * 64
    assert len(batch.document_ids) == len(lengths)
    flat_positions = batch.position_ids.reshape(-1)
    assert (flat_positions[batch.cu_seqlens[:-1]] == 0).all()
    assert (np.diff(flat_positions)[~np.isin(np.arange(1, 24 * 64), batch.cu_seqlens)] == 1).all()
    eos = batch.tokens[:, :-1] == 0
    assert (batch.loss_mask == ~eos).all()  # the end-of-document token predicts nothing; everything else does


def test_schedule_changes_the_mixture_at_its_steps_and_is_journaled(data_config: Make) -> None:
    stages = [{"from_step": 5, "weights": {"b": 1.0}}, {"from_step": 9, "weights": {"c": 1, "d": 1}}]
    scheduler = Scheduler(data_config(policy={"kind": "schedule", "options": {"stages": stages}}, prefetch=3))
    shares = [np.bincount(next(scheduler).source_ids, minlength=4) for _ in range(12)]
    scheduler.close()
    assert all(counts[1] >= 23 for counts in shares[5:9])
    assert all(counts[2] + counts[3] >= 23 for counts in shares[9:])
    mixtures = scheduler.journal.of("mixture")
    assert [(event.step, event.by) for event in mixtures[:3]] == [(step, "policy:schedule") for step in (0, 5, 9)]


def test_restart_in_a_run_folder_continues_its_journal(data_config: Make, tmp_path: Path) -> None:
    first = Scheduler(data_config(), run_dir=tmp_path)
    for _ in range(4):
        next(first)
    state = first.state_dict()
    for _ in range(3):
        next(first)  # trained after the last checkpoint, then killed
    again = Scheduler(data_config(seq_len=32), run_dir=tmp_path)
    again.load_state_dict(state)
    assert next(again).tokens.shape == (24, 33)
    kinds = [(event.kind, event.step) for event in Journal(tmp_path / "journal.jsonl", writable=False).events]
    assert kinds == [
        ("run_started", 0), ("manifest", 0), ("manifest", 0), ("manifest", 0), ("manifest", 0), ("stage", 0),
        ("mixture", 0), ("resumed", 4), ("stage", 4),
    ]  # fmt: skip


def test_new_files_do_not_change_a_running_order(data_config: Make, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "0.jsonl").write_bytes((corpus / "a" / "0.jsonl").read_bytes())
    config = data_config(sources=[{"name": "a", "paths": [str(tmp_path / "src")]}])
    first = Scheduler(config, run_dir=tmp_path / "run")
    hashes = [next(first).digests for _ in range(6)]
    (tmp_path / "src" / "1.jsonl").write_bytes(jsonl(["new"] * 50))
    again = Scheduler(config, run_dir=tmp_path / "run")
    assert [next(again).digests for _ in range(6)] == hashes


def test_a_source_added_on_resume_is_journaled_and_drawn(data_config: Make, corpus: Path, tmp_path: Path) -> None:
    names = [{"name": name, "paths": [str(corpus / name)]} for name in "abc"]
    first = Scheduler(data_config(sources=names[:2]), run_dir=tmp_path)
    for _ in range(3):
        next(first)
    again = Scheduler(data_config(sources=names), run_dir=tmp_path)
    again.load_state_dict(first.state_dict())
    assert np.bincount(next(again).source_ids).tolist() == [8, 8, 8]
    assert [event.data["source"]["name"] for event in again.journal.of("source_added")] == ["c"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 5}, "data.seed is 5 but the run"),
        ({"lanes": 48}, "data.lanes is 48"),
        ({"sources": [{"name": "z", "paths": ["PLACE/a"]}]}, "add new sources after them"),
    ],
)
def test_a_run_keeps_its_identity(
    data_config: Make, corpus: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    next(Scheduler(data_config(), run_dir=tmp_path))
    text = json.dumps(change).replace("PLACE", str(corpus))
    with pytest.raises(ConfigError, match=message):
        Scheduler(data_config(**json.loads(text)), run_dir=tmp_path)


@pytest.mark.parametrize(
    ("batch", "lanes"), [(8, 240), (7, 238), (128, 128), (240, 240), (480, 240), (1024, 128), (241, 1)]
)
def test_lanes_allow_every_size_that_the_batch_allows(data_config: Make, batch: int, lanes: int) -> None:
    asked = data_config(global_batch_size=batch).model_dump(exclude={"lanes"})
    assert DataConfig.model_validate(asked).lanes == lanes


def test_a_run_keeps_the_lanes_it_began_with(data_config: Make, tmp_path: Path) -> None:
    def config(batch: int) -> DataConfig:
        asked = data_config(global_batch_size=batch).model_dump(exclude={"lanes", "chunk_bytes"})
        return DataConfig.model_validate(asked)

    first = Scheduler(config(7), run_dir=tmp_path)
    next(first)
    again = Scheduler(config(16), run_dir=tmp_path)
    again.load_state_dict(first.state_dict())
    assert next(again).tokens.shape[0] == 16
    assert again.config.lanes == 238
    with pytest.raises(LayoutError, match=r"must divide data.lanes \(238\)"):
        Scheduler(config(16), run_dir=tmp_path, dp_rank=0, dp_size=16)


def test_a_changed_or_lost_file_is_named_on_resume(data_config: Make, corpus: Path, tmp_path: Path) -> None:
    copy = tmp_path / "a.jsonl"
    copy.write_bytes((corpus / "a" / "0.jsonl").read_bytes())
    config = data_config(sources=[{"name": "a", "paths": [str(copy)]}])
    next(Scheduler(config, run_dir=tmp_path / "run"))
    copy.write_bytes(copy.read_bytes() + b"\n")
    with pytest.raises(DataError, match="put the old file back"):
        Scheduler(config, run_dir=tmp_path / "run")
    copy.unlink()
    with pytest.raises(DataError, match="is gone"):
        Scheduler(config, run_dir=tmp_path / "run")


def test_rejects_are_named_counted_and_limited(data_config: Make, tmp_path: Path) -> None:
    good = [f"document {number} " * 20 for number in range(1500)]
    lines = jsonl(good).splitlines(keepends=True)
    lines[7:7] = [b"{broken\n"]
    (tmp_path / "x.jsonl").write_bytes(b"".join(lines))
    source = {"name": "x", "paths": [str(tmp_path / "x.jsonl")]}
    scheduler = Scheduler(data_config(sources=[source], lanes=8, global_batch_size=8))
    rejects = [reject for _ in range(700) for reject in next(scheduler).rejects]
    assert {(reject.source, reject.file) for reject in rejects} == {("x", str(tmp_path / "x.jsonl"))}
    assert all("not valid JSON" in reject.reason for reject in rejects)
    lines[9:9] = [b"{broken\n"] * 40
    (tmp_path / "x.jsonl").write_bytes(b"".join(lines))
    scheduler = Scheduler(data_config(sources=[source], lanes=8, global_batch_size=8))
    with pytest.raises(DataError, match=r"of \d+ records rejected, past max_reject_fraction=0.001.*x.jsonl, record"):
        for _ in range(700):
            next(scheduler)
    with pytest.raises(DataError, match="on_error is `stop`"):
        scheduler = Scheduler(data_config(sources=[source | {"on_error": "stop"}], lanes=8, global_batch_size=8))
        for _ in range(700):
            next(scheduler)


def test_fewer_documents_than_lanes_still_feeds_every_lane(data_config: Make, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(jsonl(["one little document", "another", "a third"]))
    scheduler = Scheduler(data_config(sources=[{"name": "x", "paths": [str(tmp_path / "x.jsonl")]}]))
    for _ in range(3):
        assert next(scheduler).tokens.shape == (24, 65)


def test_layouts_that_do_not_divide_are_refused_with_the_nearest(data_config: Make) -> None:
    with pytest.raises(LayoutError, match=r"size 5 must divide.*nearest that do: 4, 6, 3|nearest that do: 3, 4, 6"):
        Scheduler(data_config(), dp_rank=0, dp_size=5)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, ConfigError, "source 'x': no file at"),
        (b"", ConfigError, "all 1 files are empty"),
        (b"\n\n", DataError, "too few"),
    ],
)
def test_missing_and_empty_sources(
    data_config: Make, tmp_path: Path, content: bytes | None, error: type[Exception], message: str
) -> None:
    if content is not None:
        (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(error, match=message):
        next(Scheduler(data_config(sources=[{"name": "x", "paths": [str(tmp_path / "x.jsonl")]}])))


def test_an_error_in_the_loader_thread_reaches_the_consumer_each_time(data_config: Make, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"{broken\n" * 50)
    source = {"name": "x", "paths": [str(tmp_path / "x.jsonl")], "on_error": "stop"}
    scheduler = Scheduler(data_config(sources=[source], prefetch=2))
    for _ in range(2):
        with pytest.raises(DataError):
            next(scheduler)
    scheduler.close()


def test_what_a_person_set_outlives_a_restart_until_the_configuration_changes(
    data_config: Make, tmp_path: Path
) -> None:
    first = Scheduler(data_config(), run_dir=tmp_path)
    for _ in range(3):
        next(first)
    first.plan.apply(first.journal.append("mixture", 4, {"weights": {"a": 0.0, "d": 1.0}}, "user:ada"))
    counts = [np.bincount(next(first).source_ids, minlength=4) for _ in range(4)]
    assert [count[3] >= 23 for count in counts] == [False, True, True, True]
    again = Scheduler(data_config(), run_dir=tmp_path)
    again.load_state_dict(first.state_dict())
    assert np.bincount(next(again).source_ids, minlength=4)[3] >= 23
    weights = [{"name": source.name, "paths": source.paths, "weight": 1.0} for source in data_config().sources]
    changed = Scheduler(data_config(sources=weights), run_dir=tmp_path)
    changed.load_state_dict(again.state_dict())
    assert np.bincount(next(changed).source_ids, minlength=4)[3] <= 7


def test_a_scheduler_that_nobody_closed_goes_with_its_thread(data_config: Make) -> None:
    before = set(threading.enumerate())
    scheduler = Scheduler(data_config(prefetch=2))
    next(scheduler)
    (thread,) = set(threading.enumerate()) - before
    gone = weakref.ref(scheduler)
    del scheduler
    for _ in range(600):
        gc.collect()
        thread.join(timeout=0.1)  # it may be in the middle of a batch, and hold it until that is ready
        if not thread.is_alive():
            break
    assert not thread.is_alive()
    assert gone() is None
