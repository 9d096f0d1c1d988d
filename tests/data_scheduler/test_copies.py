"""Copies change speed and nothing else: what is read, however often, by however many processes."""

import gzip
import json
import lzma
import os
import random
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from large_files import LANES, PACK, Make, everything, one_file, steps, text_of

from data_scheduler import Scheduler, batch_sha256, chunks, copy_file
from data_scheduler.encoder import load_encoder
from data_scheduler.replay import ledger, replay, trace
from data_scheduler.source import SourceReader

pytestmark = pytest.mark.usefixtures("small_thresholds")


@pytest.mark.parametrize("kind", PACK)
@pytest.mark.parametrize("damage", [False, True])
def test_the_stream_is_the_same_without_cold_and_warm(
    data_config: Make, tmp_path: Path, kind: str, damage: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    suffix, pack = PACK[kind]
    path, text = tmp_path / f"x.jsonl{suffix}", text_of(3000)
    packed = pack(text)
    path.write_bytes(packed[: len(packed) * 3 // 4] if damage else packed)
    cold = Scheduler(one_file(data_config, path, tmp_path / "cache"))
    expected, found = steps(cold, 12), everything(cold.readers[0])
    assert list((tmp_path / "cache" / "copies").glob("*.blocks"))
    warm = Scheduler(one_file(data_config, path, tmp_path / "cache"))
    off = Scheduler(one_file(data_config, path, tmp_path / "cache", cache_max_bytes=0))
    monkeypatch.setattr(chunks, "HELD_TEXT", 1 << 30)
    held = Scheduler(one_file(data_config, path, tmp_path / "cache"))
    for scheduler in (warm, off, held):
        assert steps(scheduler, 12) == expected
        assert everything(scheduler.readers[0]) == found
    texts = [line["text"] for line in map(json.loads, _good_lines(text))]
    given = [document for documents in found[0] for document in documents if document is not None]
    if damage:
        assert 1000 < len(given) < 3000
        assert sorted(given, key=_number) == texts[: len(given)]
        assert [reason for *_, reason in found[1] if "truncated" in reason] != []
    else:
        assert sorted(given, key=_number) == texts
    assert len(found[1]) == damage + (len(given) > 1500)  # the broken line stands in the middle


def _good_lines(text: bytes) -> list[bytes]:
    return [line for line in text.split(b"\r\n") if line and line != b"{broken"]


def _number(text: str) -> int:
    return int(text.split()[0])


def test_chunks_of_a_file_are_alike_whatever_it_compresses_to(data_config: Make, tmp_path: Path) -> None:
    """TEXT_PER_COMPRESSED_BYTE is a guess of 4; these are 1.3 and 10."""
    rng = random.Random(0)
    noise = b"".join(b'{"text": "%s"}\n' % rng.randbytes(60).hex().encode() for _ in range(20_000))
    plain = text_of(3000).replace(b"\r\n", b"\n")
    for text in (noise, plain * 3):
        path = tmp_path / "x.jsonl.zst"
        path.write_bytes(zstandard.compress(text, 9))
        reader = Scheduler(one_file(data_config, path, tmp_path / "cache")).readers[0]
        lengths = [sum(len(text or "") for text in documents) for documents in everything(reader)[0]]
        assert len(lengths) >= 2 * LANES
        assert min(lengths) > 0.4 * np.mean(lengths)
        assert max(lengths) < 1.6 * np.mean(lengths) + 60_000  # the longest line


def test_240_lanes_decompress_a_file_once(data_config: Make, tmp_path: Path, fed: list[int]) -> None:
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(zstandard.compress(text_of(6000)))
    config = one_file(data_config, path, tmp_path / "cache", lanes=240, global_batch_size=240)
    encoder = load_encoder(config.tokenizer)
    ranks = [Scheduler(config, dp_rank=rank, dp_size=4, encoder=encoder) for rank in range(4)]
    for _ in range(3):
        for rank in ranks:
            next(rank)
    assert len(ranks[0].readers[0].chunks) >= 240
    assert sum(fed) == path.stat().st_size
    steps(Scheduler(config, dp_rank=1, dp_size=2, encoder=encoder), 3)
    assert sum(fed) == path.stat().st_size
    slow = Scheduler(config.model_copy(update={"cache_max_bytes": 0}), encoder=encoder)
    next(slow)
    assert sum(fed) > 200 * path.stat().st_size  # what it would cost


def test_a_chunk_is_opened_with_its_own_bytes(
    data_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(zstandard.compress(text_of(4000)))
    reader = Scheduler(one_file(data_config, path, tmp_path / "cache")).readers[0]
    reader.records(0)
    read: list[int] = []
    pread = os.pread
    monkeypatch.setattr(copy_file.os, "pread", lambda file, size, at: read.append(size) or pread(file, size, at))
    total = sum(len(_packed(reader, chunk, read)) for chunk in range(len(reader.chunks)))
    (copy,) = (tmp_path / "cache" / "copies").glob("*.blocks")
    assert total == len(reader.chunks)
    assert sum(read) <= copy.stat().st_size
    assert max(read) < copy.stat().st_size / 10


def _packed(reader: SourceReader, chunk: int, read: list[int]) -> list[int]:
    reader.records(chunk)
    return [chunk]


def test_replay_trace_and_ledger_read_through_copies(data_config: Make, tmp_path: Path) -> None:
    path, text = tmp_path / "x.jsonl.gz", text_of(1500)
    path.write_bytes(gzip.compress(text))
    run = tmp_path / "run"
    scheduler = Scheduler(one_file(data_config, path, tmp_path / "cache"), run_dir=run)
    hashes = steps(scheduler, 8)
    from data_scheduler.state import Snapshots

    Snapshots(run).save(scheduler.state_dict())
    shutil.rmtree(tmp_path / "cache")
    assert [batch_sha256(batch.digests) for batch in replay(run, 2, 7)] == hashes[2:]
    for document in trace(run, 5):
        assert document.within is not None
        begin, end = document.within
        starts = [0, *(at + 1 for at, byte in enumerate(text) if byte == 10)]
        own = [at for at in starts if begin <= at < end and text[at : at + 2] != b"\r\n"]
        line = text[own[document.record] :].split(b"\n")[0]
        assert json.loads(line)["text"] == document.text
    assert sum(ledger(run)[1][0].documents_seen) == 1500


def test_rejects_name_the_same_record_every_time(data_config: Make, tmp_path: Path) -> None:
    path, text = tmp_path / "x.jsonl.xz", text_of(900)
    path.write_bytes(lzma.compress(text))
    reader = Scheduler(one_file(data_config, path, tmp_path / "cache")).readers[0]
    ((source, file, record, reason),) = everything(reader)[1]
    assert (source, file) == ("big", str(path))
    assert "not valid JSON" in reason
    number, place = record.split(" of bytes ")
    begin, end = map(int, place.split("-"))
    starts = [0, *(at + 1 for at, byte in enumerate(text) if byte == 10)]
    own = [at for at in starts if begin <= at < end and text[at : at + 2] != b"\r\n"]
    assert text[own[int(number)] :].startswith(b"{broken")


def test_a_remote_file_is_copied_like_a_local_one(data_config: Make, tmp_path: Path) -> None:
    packed = zstandard.compress(text_of(1200))
    (tmp_path / "x.jsonl.zst").write_bytes(packed)
    fsspec.filesystem("memory").pipe_file("/copies/x.jsonl.zst", packed)
    local = Scheduler(one_file(data_config, tmp_path / "x.jsonl.zst", tmp_path / "cache"))
    source = {"name": "big", "paths": ["memory://copies/x.jsonl.zst"], "max_reject_fraction": 1.0}
    remote = Scheduler(data_config(sources=[source], cache_dir=str(tmp_path / "cache")))
    assert steps(remote, 5) == steps(local, 5)
    assert len(list((tmp_path / "cache" / "copies").glob("*.blocks"))) == 2
    fsspec.filesystem("memory").rm("/copies", recursive=True)


# -- large row groups -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("settings", [{}, {"template": "{title}: {text}", "where": "n % 3 != 1"}])
def test_row_groups_are_read_through_copies(
    data_config: Make, tmp_path: Path, kind: str, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {key: value.replace("n % 3 != 1", "n > 40") for key, value in settings.items()}
    rows = [
        {"text": None if n % 97 == 5 else f"{n} " + "water " * (n % 50), "title": f"t{n}", "n": n} for n in range(3000)
    ]
    table = pa.Table.from_pylist([row | {"unused": "x" * 200} for row in rows])
    path = tmp_path / f"x.{kind}"
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=1300)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=1300)
    source = {"name": "rows", "paths": [str(path)], "max_reject_fraction": 1.0, **settings}
    config = data_config(sources=[source], cache_dir=str(tmp_path / "cache"))
    cold = Scheduler(config)
    expected, found = steps(cold, 10), everything(cold.readers[0])
    made = list((tmp_path / "cache" / "copies").glob("*.blocks"))
    assert len(made) == 3  # one for each row group
    warm, off = Scheduler(config), Scheduler(config.model_copy(update={"cache_max_bytes": 0}))
    for scheduler in (warm, off):
        assert steps(scheduler, 10) == expected
        assert everything(scheduler.readers[0]) == found
    documents = [document for documents in found[0] for document in documents]
    assert len(documents) == 3000
    if not settings:
        assert documents == [row["text"] for row in rows]
        assert [int(record) for _, _, record, _ in found[1]] == [n for n in range(3000) if n % 97 == 5]


@pytest.mark.parametrize("trouble", ["damaged", "no column", "not text"])
def test_a_row_group_that_cannot_be_copied_is_rejected_as_without_copies(
    data_config: Make, tmp_path: Path, trouble: str
) -> None:
    path = tmp_path / "x.parquet"
    texts = [f"{n} " + "water " * (n % 50) for n in range(3000)]
    column = pa.array(range(3000)) if trouble == "not text" else pa.array(texts)
    pq.write_table(pa.table({"body" if trouble == "no column" else "text": column}), path, row_group_size=1000)
    if trouble == "damaged":
        data = bytearray(path.read_bytes())
        data[20:400] = bytes(380)
        path.write_bytes(bytes(data))
    source = {"name": "rows", "paths": [str(path)], "max_reject_fraction": 1.0}
    config = data_config(sources=[source], cache_dir=str(tmp_path / "cache"), chunk_bytes=1024)
    encoder = load_encoder(config.tokenizer)
    found = everything(Scheduler(config, encoder=encoder).readers[0])
    off = config.model_copy(update={"cache_max_bytes": 0})
    assert everything(Scheduler(off, encoder=encoder).readers[0]) == found
    assert found[1]
    assert len(found[1]) == (1 if trouble == "damaged" else 3)
    assert len(list((tmp_path / "cache" / "copies").glob("*.blocks"))) == (2 if trouble == "damaged" else 0)
