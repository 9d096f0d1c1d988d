from collections.abc import Callable
from pathlib import Path

import pytest

from data_scheduler import DataConfig, Scheduler, batch_sha256
from data_scheduler.replay import ledger, replay, trace
from data_scheduler.state import Snapshots
from headrace.errors import ConfigError

Make = Callable[..., DataConfig]


@pytest.fixture(scope="module")
def finished(data_config: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run of 40 steps with a mixture change, a kept state at 15 and at 30, killed at 33 and resumed from 30."""
    run_dir = tmp_path_factory.mktemp("finished")
    stages = [{"from_step": 20, "weights": {"c": 0.9, "d": 0.1}}]
    config = data_config(policy={"kind": "schedule", "options": {"stages": stages}}, prefetch=2)
    hashes: list[str] = []
    scheduler = Scheduler(config, run_dir=run_dir)
    for step in range(33):
        if step in (15, 30):
            Snapshots(run_dir).save(scheduler.state_dict())
        hashes.append(batch_sha256(next(scheduler).digests))
    scheduler.close()
    resumed = Scheduler(config, run_dir=run_dir)
    state = Snapshots(run_dir).nearest(39)
    assert state is not None
    resumed.load_state_dict(state)
    hashes = hashes[:30] + [batch_sha256(next(resumed).digests) for _ in range(10)]
    Snapshots(run_dir).save(resumed.state_dict())
    resumed.close()
    return run_dir, hashes


@pytest.mark.parametrize(("first", "last"), [(0, 3), (13, 22), (29, 39), (17, 17)])
def test_replay_makes_past_batches_again(finished: tuple[Path, list[str]], first: int, last: int) -> None:
    run_dir, hashes = finished
    before = (run_dir / "journal.jsonl").read_bytes()
    again = [(batch.step, batch_sha256(batch.digests)) for batch in replay(run_dir, first, last)]
    assert again == [(step, hashes[step]) for step in range(first, last + 1)]
    assert (run_dir / "journal.jsonl").read_bytes() == before  # looking back changes nothing


def test_trace_names_the_documents_whose_tokens_are_in_the_batch(finished: tuple[Path, list[str]]) -> None:
    run_dir, _ = finished
    batch = next(iter(replay(run_dir, 25, 25)))
    documents = trace(run_dir, 25)
    scheduler = Scheduler(_config_of(run_dir))
    for slot in range(len(batch.slots)):
        tokens: list[int] = []
        for document in (found for found in documents if found.slot == slot):
            assert document.file.startswith(str(Path(document.file).parent))
            assert document.text.startswith(f"{document.source}-")
            encoded, _ = scheduler.encoder.encode_batch([document.text])
            whole = [*encoded.tolist(), scheduler.encoder.eos_id]
            tokens += whole[document.token_start : document.token_stop]
        assert tokens == batch.tokens[slot].tolist()
    assert trace(run_dir, 25, slot=3) == [document for document in documents if document.slot == 3]


def test_trace_finds_the_record_in_the_file(finished: tuple[Path, list[str]]) -> None:
    import gzip
    import json

    import pyarrow.parquet as pq
    import zstandard

    run_dir, _ = finished
    documents = [document for step in (3, 25) for document in trace(run_dir, step)]
    assert {document.source for document in documents} == set("abcd")
    for document in documents:
        path = Path(document.file)
        if path.suffix == ".parquet":
            assert pq.read_table(path)["text"][document.record].as_py() == document.text
            continue
        raw = path.read_bytes()
        data = {".gz": gzip.decompress, ".zst": zstandard.decompress}.get(path.suffix, bytes)(raw)
        if document.within:
            begin, end = document.within
            starts = [0, *(at + 1 for at, byte in enumerate(data) if byte == 10)]
            at = [start for start in starts if begin <= start < end][document.record]
            line = data[at:].split(b"\n")[0]
        else:
            line = data.split(b"\n")[document.record]
        assert json.loads(line)["text"] == document.text


def test_ledger_adds_up(finished: tuple[Path, list[str]]) -> None:
    run_dir, _ = finished
    step, rows = ledger(run_dir)
    assert step == 40
    assert sum(row.sequences for row in rows) == 40 * 24
    for row in rows:
        assert row.tokens == row.sequences * 65
        assert abs(row.share_asked - row.share_realised) * 40 * 24 < 2
        expected = {"a": 300, "b": 180, "c": 150, "d": 200}[row.source]
        assert sum(row.documents_seen) == expected


def test_ledger_counts_documents_as_a_trace_of_every_step_does(finished: tuple[Path, list[str]]) -> None:
    run_dir, _ = finished
    seen: dict[str, dict[str, int]] = {name: {} for name in "abcd"}
    for step in range(18):
        for document in trace(run_dir, step):
            if document.token_start == 0:
                texts = seen[document.source]
                texts[document.text] = texts.get(document.text, 0) + 1
    for row in ledger(run_dir, 18)[1]:
        counts = list(seen[row.source].values())
        for times in range(1, len(row.documents_seen)):
            assert row.documents_seen[times] == counts.count(times)


def test_steps_the_run_never_made_are_refused(finished: tuple[Path, list[str]], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no journal.jsonl"):
        list(replay(tmp_path, 0, 1))
    with pytest.raises(ConfigError, match="0 <= A <= B"):
        list(replay(finished[0], 5, 2))
    with pytest.raises(ConfigError, match="slot 99"):
        trace(finished[0], 3, slot=99)


def _config_of(run_dir: Path) -> DataConfig:
    from data_scheduler.replay import open_run

    return open_run(run_dir).config
