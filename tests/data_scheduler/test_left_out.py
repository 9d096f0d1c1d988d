"""Quarantine of files and records: passed over from a journaled step on, the same after any stop and in replay."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from small_corpus import jsonl, make_documents

from data_scheduler import DataConfig, Journal, Scheduler, batch_sha256, merge_states
from data_scheduler.batch import ORDINAL_BITS
from data_scheduler.control import Decision, RefusedError, decide_quarantine, decide_undo
from data_scheduler.journal import Event
from data_scheduler.lane import LaneStream
from data_scheduler.left_out import LeftOut, Part, check_part
from data_scheduler.replay import ledger, replay, trace
from data_scheduler.source import SourceReader
from data_scheduler.state import Snapshots
from headrace.errors import ConfigError

Make = Callable[..., DataConfig]
STEPS, OUT, STOP, BACK = 40, 8, 15, 26
NAMES: WeakKeyDictionary[SourceReader, dict[int, list[str]]] = WeakKeyDictionary()
"""By reader and chunk."""
FORMATS = ["plain", "blocks", "parquet", "csv"]


@pytest.fixture
def spoiled(data_config: Make, tmp_path: Path) -> Make:
    """A source s of three files of `kind`, and a source t."""

    def make(kind: str = "plain", **changes: Any) -> DataConfig:
        folder = tmp_path / kind
        if not folder.exists():
            folder.mkdir()
            for number in range(3):
                texts = make_documents(f"f{number}", 70, 0)
                if kind == "plain":
                    (folder / f"{number}.jsonl").write_bytes(jsonl(texts))
                elif kind == "blocks":
                    (folder / f"{number}.jsonl.zst").write_bytes(zstandard.compress(jsonl(texts)))
                elif kind == "parquet":
                    pq.write_table(pa.table({"text": texts}), folder / f"{number}.parquet", row_group_size=40)
                else:
                    (folder / f"{number}.csv").write_text("text\n" + "\n".join(texts) + "\n")
        (tmp_path / "t.jsonl").write_bytes(jsonl(make_documents("t", 300, 0)))
        source = {"name": "s", "paths": [str(folder)], "weight": 3.0} | changes.pop("source", {})
        sources = [source, {"name": "t", "paths": [str(tmp_path / "t.jsonl")]}]
        settled = {"sources": sources, "lanes": 4, "global_batch_size": 12, "chunk_bytes": 2048, "prefetch": 2}
        return data_config(**settled | changes)

    return make


def opened(config: DataConfig, run_dir: Path, dp: int, prefetch: int = 2) -> list[Scheduler]:
    config = config.model_copy(update={"prefetch": prefetch})
    ranks = [Scheduler(config, run_dir=run_dir, dp_size=dp)]
    for rank in range(1, dp):
        journal = Journal(run_dir / "journal.jsonl", writable=False)
        ranks.append(Scheduler(config, journal=journal, dp_rank=rank, dp_size=dp))
    return ranks


def name_of(reader: SourceReader, document: int) -> str:
    """The first word of a document, which is its name."""
    known = NAMES.setdefault(reader, {})
    chunk, place = document >> ORDINAL_BITS, document & ((1 << ORDINAL_BITS) - 1)
    if chunk not in known:
        known[chunk] = [str(text).split(" ")[0] for text in reader.read(chunk).documents]
    return known[chunk][place]


def step(ranks: list[Scheduler], begun: dict[int, list[str]] | None = None) -> str:
    """One step on all ranks; `begun`: what documents begin in it, by their first words."""
    digests: dict[int, bytes] = {}
    for rank in ranks:
        batch = next(rank)
        digests.update(zip(batch.slots.tolist(), batch.digests, strict=True))
        through = [rank.names[number] for number in np.flatnonzero(batch.exhausted).tolist()] if len(ranks) == 1 else []
        rank.feedback(batch.step, {}, {}, through)
        for row, source in enumerate(batch.source_ids.tolist() if begun is not None else []):
            for document, offset in zip(batch.segment_ids[row].tolist(), batch.offsets[row].tolist(), strict=True):
                if begun is not None and source == 0 and offset == 0:
                    begun.setdefault(batch.step, []).append(name_of(rank.readers[0], document))
    return batch_sha256([digests[slot] for slot in range(len(digests))])


def asked(ranks: list[Scheduler], decision: Decision, command: str) -> Event:
    for rank in ranks:
        event = rank.take(Decision(decision.kind, decision.step, decision.data | {"command": command}), "user:ada")
    return event


def part_of(run_dir: Path, at: int, whole: bool) -> Part:
    """A document of s that a lane is giving, as trace names it: one that has begun and goes on, where there is one."""
    documents = [document for document in trace(run_dir, at) if document.source == "s"]
    document = max(documents, key=lambda one: one.token_stop)
    return Part(document.file) if whole else Part(document.file, document.record, document.within)


@pytest.mark.parametrize(
    ("kind", "packing", "whole"),
    [
        ("plain", "split", True), ("plain", "best_fit", False),
        ("blocks", "split", False), ("blocks", "best_fit", True),
        ("parquet", "split", False), ("parquet", "best_fit", True),
        ("csv", "split", False), ("csv", "best_fit", False),
    ],
)  # fmt: skip
def test_left_out_from_a_step_on_through_stops_and_replay(
    spoiled: Make, tmp_path: Path, kind: str, packing: str, whole: bool
) -> None:
    config = spoiled(kind, packing=packing)
    # The run without it, to choose from.
    plain = opened(config, tmp_path / "plain_run", 1)
    before: dict[int, list[str]] = {}
    untouched = [step(plain, before) for _ in range(STEPS)]
    plain[0].close()
    part = part_of(tmp_path / "plain_run", OUT + 3, whole)
    reader = plain[0].readers[0]
    named = {
        document.split(" ")[0]
        for chunk in reader.chunks_of(part.file)
        for place, document in enumerate(reader.read(chunk).documents)
        if isinstance(document, str)
        and (whole or (part.record, part.within) == reader.record_number(chunk, reader.read(chunk), place))
    }
    assert len(named) == (70 if whole else 1)

    run_dir = tmp_path / "run"
    ranks, begun, hashes = opened(config, run_dir, 1), dict[int, list[str]](), list[str]()
    for _ in range(OUT):
        hashes.append(step(ranks, begun))
    check_part(reader, part, [])
    first = ranks[0].earliest_change
    event = asked(ranks, decide_quarantine(ranks[0].names, "s", ranks[0].plan, first, part), "out")
    assert ranks[0].plan.parts_out("s", first - 1) == []
    assert ranks[0].plan.parts_out("s", first) == [part]
    for _ in range(OUT, BACK):
        hashes.append(step(ranks, begun))
        if len(hashes) == STOP:
            state = ranks[0].state_dict()
            Snapshots(run_dir).save(merge_states([state]))
    back = ranks[0].earliest_change
    asked(ranks, decide_undo(ranks[0].journal, event.seq, 0, back), "back")
    for _ in range(BACK, STEPS):
        hashes.append(step(ranks, begun))
    for scheduler in ranks:
        scheduler.close()

    assert hashes[:first] == untouched[:first]
    assert hashes[first:] != untouched[first:]
    # A window of 16 sequences that a lane had laid out before lasts seven steps, at 2.25 sequences of s a step.
    clear = first if packing == "split" else first + 8
    assert not [name for at in range(clear, back) for name in begun[at] if name in named]
    assert not whole or any(name in named for at in range(back, STEPS) for name in begun[at])

    # Killed after STOP steps, gone on with on four ranks; the journal has the undoing that is to come.
    again = opened(config, run_dir, 4, prefetch=1)
    for rank in again:
        rank.load_state_dict(state)
    assert [step(again) for _ in range(STOP, STEPS)] == hashes[STOP:]
    for scheduler in again:
        scheduler.close()
    # Again from the journal alone, and from the kept state.
    assert [batch_sha256(batch.digests) for batch in replay(run_dir, STOP + 2, STEPS - 1)] == hashes[STOP + 2 :]
    for kept in (run_dir / "data_state").iterdir():
        kept.unlink()
    assert [batch_sha256(batch.digests) for batch in replay(run_dir, 0, STEPS - 1)] == hashes


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_everything_else_is_seen_once_an_epoch(spoiled: Make, tmp_path: Path, packing: str) -> None:
    config = spoiled("parquet", packing=packing, source={"max_epochs": 1}, prefetch=0, policy={"horizon": 3})
    ranks = opened(config, tmp_path / "run", 1, prefetch=0)
    file = ranks[0].readers[0].manifest.files[1][0]
    begun: dict[int, list[str]] = {}
    for at in range(60):
        if at == 1:
            asked(ranks, decide_quarantine(ranks[0].names, "s", ranks[0].plan, 1, Part(file)), "out")
        step(ranks, begun)
    counts = Counter(name for names in begun.values() for name in names)
    late = Counter(name for at, names in begun.items() if at >= 1 for name in names)
    assert packing == "best_fit" or not [name for name in late if name.startswith("f1-")]
    assert set(counts.values()) == {1}
    assert len([name for name in counts if not name.startswith("f1-")]) > 100
    assert ranks[0].plan.is_capped("s", 60)


@pytest.mark.parametrize("whole", [True, False])
def test_the_ledger_does_not_count_what_was_passed_over(spoiled: Make, tmp_path: Path, whole: bool) -> None:
    ranks = opened(spoiled("parquet"), tmp_path / "run", 1, prefetch=0)
    file = ranks[0].readers[0].manifest.files[1][0]
    begun: dict[int, list[str]] = {}
    events = []
    for at in range(60):
        if at == 6:
            parts = [Part(file)] if whole else [Part(file, record) for record in range(5, 30)]
            for number, part in enumerate(parts):
                decision = decide_quarantine(["s", "t"], "s", ranks[0].plan, 6, part)
                events.append(asked(ranks, decision, f"out {number}"))
        if at == 45:
            for event in events:
                asked(ranks, decide_undo(ranks[0].journal, event.seq, 0, 45), f"back {event.seq}")
        step(ranks, begun)
        if at in (39, 59):
            Snapshots(tmp_path / "run").save(merge_states([ranks[0].state_dict()]))
            times = Counter(name for names in begun.values() for name in names)
            _, rows = ledger(tmp_path / "run", at + 1)
            seen = {number: count for number, count in enumerate(rows[0].documents_seen) if count}
            expected = Counter([*times.values(), *[0] * (210 - len(times))])
            assert seen == {number: count for number, count in expected.items() if count}, at
    assert max(times.values()) > 1


def test_a_document_that_was_begun_is_broken_off_and_the_next_begins_at_its_beginning(
    spoiled: Make, tmp_path: Path
) -> None:
    scheduler = opened(spoiled(), tmp_path / "run", 1, prefetch=0)[0]
    for _ in range(5):
        next(scheduler)
    reader, cut = scheduler.readers[0], 0
    for lane in range(4):
        place, _ = scheduler.place(lane, 0)
        row = np.empty(200, np.int64)
        reader.left_out, reader.generations = [], 1
        before = LaneStream(reader, lane, place).take(row)
        document = int(before.document_ids[0])
        chunk, number = document >> ORDINAL_BITS, document & ((1 << ORDINAL_BITS) - 1)
        file = reader.chunks[chunk].unit.path
        for part in (Part(file), Part(file, *reader.record_number(chunk, reader.read(chunk), number))):
            reader.left_out, reader.generations = [LeftOut(part, 2)], 2
            after = LaneStream(reader, lane, place).take(row)
            assert document not in after.document_ids
            assert not after.offsets.any()
        cut += bool(before.offsets[0])
    assert cut, "some lane was in the middle of a document"


def test_a_resumed_run_keeps_what_is_out(spoiled: Make, tmp_path: Path) -> None:
    ranks = opened(spoiled(), tmp_path / "run", 1)
    for _ in range(4):
        step(ranks)
    state = ranks[0].state_dict()
    for _ in range(4):
        step(ranks)
    file = ranks[0].readers[0].manifest.files[0][0]
    asked(ranks, decide_quarantine(["s", "t"], "s", ranks[0].plan, 11, Part(file)), "out")
    ranks[0].close()
    again = opened(spoiled(), tmp_path / "run", 1)
    again[0].load_state_dict(state)  # from before it was asked for
    begun: dict[int, list[str]] = {}
    for _ in range(4, 20):
        step(again, begun)
    again[0].close()
    assert any(name.startswith("f0-") for at in range(4, 11) for name in begun[at])
    assert not any(name.startswith("f0-") for at in range(11, 20) for name in begun[at])


def test_files_that_join_and_files_that_are_out(spoiled: Make, tmp_path: Path) -> None:
    config = spoiled(source={"watch": True}, watch_every=2, policy={"horizon": 6})
    ranks = opened(config, tmp_path / "run", 1)
    hashes, begun = [], dict[int, list[str]]()
    for at in range(60):
        if at == 3:
            (tmp_path / "plain" / "new.jsonl").write_bytes(jsonl(make_documents("new", 70, 0)))
        if at == 7:  # found by now, and not yet in force: what is decided now begins before
            file = str(tmp_path / "plain" / "0.jsonl")
            asked(ranks, decide_quarantine(["s", "t"], "s", ranks[0].plan, ranks[0].earliest_change, Part(file)), "a")
        if at == 30:
            file = str(tmp_path / "plain" / "new.jsonl")
            asked(ranks, decide_quarantine(["s", "t"], "s", ranks[0].plan, ranks[0].earliest_change, Part(file)), "b")
        hashes.append(step(ranks, begun))
    ranks[0].close()
    grown = [event.step for event in ranks[0].journal.of("grown")]
    assert len(grown) == 1
    assert grown[0] > 10
    assert any(name.startswith("new-") for at in range(33) for name in begun[at])
    assert not any(name.startswith("new-") for at in range(33, 60) for name in begun[at])
    assert not any(name.startswith("f0-") for at in range(10, 60) for name in begun[at])
    assert [batch_sha256(batch.digests) for batch in replay(tmp_path / "run", 0, 59)] == hashes


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_not_there_is_refused(spoiled: Make, tmp_path: Path, kind: str) -> None:
    scheduler = opened(spoiled(kind), tmp_path / "run", 1, prefetch=0)[0]
    reader = scheduler.readers[0]
    files = [path for path, _ in reader.manifest.files]
    for part, said in [
        (Part("nowhere.jsonl"), "has no file 'nowhere.jsonl'"),
        (Part(files[0], 999_999), "is no document of source 's'"),
        (Part(files[0], 0, (1, 7)), "is no document of source 's'"),
    ]:
        with pytest.raises(ConfigError, match=said) as error:
            check_part(reader, part, [])
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="under quarantine already"):
        check_part(reader, Part(files[0], 3), [Part(files[0])])
    check_part(reader, Part(files[2]), [Part(files[1])])
    with pytest.raises(ConfigError, match="nothing would be left of source 's'"):
        check_part(reader, Part(files[2]), [Part(files[1]), Part(files[0])])
    with pytest.raises(RefusedError, match="no source 'z'"):
        decide_quarantine(scheduler.names, "z", scheduler.plan, 3, Part(files[0]))
