"""Copies change speed and nothing else: what is read, however often, by however many processes, whatever breaks."""

import bz2
import gzip
import itertools
import json
import logging
import lzma
import multiprocessing
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from small_corpus import WORDS

from data_scheduler import DataConfig, Scheduler, batch_sha256, chunks, copies, copy_file
from data_scheduler.blocks import Block
from data_scheduler.copies import CopyFolder
from data_scheduler.copy_file import Copy, DamagedCopy
from data_scheduler.encoder import load_encoder
from data_scheduler.formats import compression
from data_scheduler.formats.compression import Codec
from data_scheduler.replay import ledger, replay, trace
from data_scheduler.source import SourceReader
from headrace.errors import DataError

Make = Callable[..., DataConfig]
LANES = 24


def multi_frame(pack: Callable[[bytes], bytes], data: bytes) -> bytes:
    edges = [len(data) * part // 5 for part in range(6)]
    return b"".join(pack(data[a:b]) for a, b in itertools.pairwise(edges))


PACK: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "zst": (".zst", zstandard.compress),
    "zst-frames": (".zst", lambda data: multi_frame(zstandard.compress, data)),
    "gz": (".gz", gzip.compress),
    "gz-members": (".gz", lambda data: multi_frame(gzip.compress, data)),
    "bz2": (".bz2", lambda data: bz2.compress(data, 1)),
    "xz": (".xz", lzma.compress),
}


def text_of(count: int) -> bytes:
    """Lines of 30 bytes to 60 KB, one cut short, blank ones between, none at the end."""
    rng = random.Random(3)
    lines = []
    for number in range(count):
        length = 10_000 if number == count // 3 else min(400, int(rng.paretovariate(1.1) * 3))
        lines.append(json.dumps({"text": f"{number} " + " ".join(rng.choices(WORDS, k=length))}).encode())
        lines += [b""] * (number % 7 == 0) + [b"{broken"] * (number == count // 2)
    return b"\r\n".join(lines)


@pytest.fixture(autouse=True)
def small_thresholds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "HELD_TEXT", 1 << 14)
    monkeypatch.setattr(copies, "_warned", set())


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Compressed bytes that decompressors of source files were given, one entry for each call."""
    given: list[int] = []

    class Counting:
        def __init__(self, codec: Codec) -> None:
            self._inner = codec.stream()

        def decompress(self, data: bytes, limit: int) -> bytes:
            given.append(len(data))
            found: bytes = self._inner.decompress(data, limit)
            given[-1] -= len(self._inner.unused_data)
            return found

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

    for suffix, codec in list(compression.CODECS.items()):
        counted = codec._replace(stream=lambda codec=codec: Counting(codec))
        monkeypatch.setitem(compression.CODECS, suffix, counted)
    return given


def one_file(data_config: Make, path: Path, cache: Path, **more: Any) -> DataConfig:
    source = {"name": "big", "paths": [str(path)], "max_reject_fraction": 1.0}
    return data_config(sources=[source], cache_dir=str(cache), **more)


def everything(reader: SourceReader) -> tuple[list[list[Any]], list[tuple[str, str, str, str]]]:
    """Documents of every chunk, and every reject."""
    reader.rejects = []
    documents = [reader.records(chunk)[0].documents for chunk in range(len(reader.chunks))]
    return documents, [tuple(reject) for reject in reader.rejects]


def steps(scheduler: Scheduler, count: int) -> list[str]:
    return [batch_sha256(next(scheduler).digests) for _ in range(count)]


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


# -- what can go wrong ------------------------------------------------------------------------------------------------


def folder_of(tmp_path: Path, max_bytes: int = 1 << 30) -> CopyFolder:
    return CopyFolder(tmp_path / "copies", max_bytes)


def blocks(count: int, seed: int = 0) -> Iterator[Block]:
    rng = random.Random(seed)
    for number in range(count):
        yield Block(2 * number, rng.randbytes(5000), "cut off" if number == count - 1 else None)


@pytest.mark.parametrize("place", ["block", "index", "length", "magic", "cut", "empty"])
def test_a_damaged_copy_is_remade_with_one_line(
    tmp_path: Path, place: str, caplog: pytest.LogCaptureFixture, data_config: Make
) -> None:
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(zstandard.compress(text_of(1200)))
    config = one_file(data_config, path, tmp_path / "cache")
    found = everything(Scheduler(config).readers[0])
    (copy,) = (tmp_path / "cache" / "copies").glob("*.blocks")
    good = copy.read_bytes()
    bad = bytearray(good)
    at = {"block": len(good) // 2, "index": len(good) - 40, "length": len(good) - 10, "magic": 3}.get(place)
    if at is not None:
        bad[at] ^= 0xEF  # not 0x10: in the first byte of a zstd frame that bit means nothing
    copy.write_bytes({"cut": good[: len(good) // 2], "empty": b""}.get(place, bytes(bad)))
    with caplog.at_level(logging.WARNING):
        assert everything(Scheduler(config).readers[0]) == found
    assert [record.message for record in caplog.records if "damaged" in record.message] != []
    assert len(caplog.records) == 1
    assert copy.read_bytes() == good


def test_a_disk_that_damages_everything_is_left_alone(
    tmp_path: Path, data_config: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(zstandard.compress(text_of(1200)))
    found = everything(Scheduler(one_file(data_config, path, tmp_path / "a", cache_max_bytes=0)).readers[0])

    def damaged(self: Copy, part: int, parts: int) -> Iterator[Block]:
        raise DamagedCopy("bytes 7 to 9")
        yield

    monkeypatch.setattr(Copy, "blocks", damaged)
    assert everything(Scheduler(one_file(data_config, path, tmp_path / "b")).readers[0]) == found
    assert len(caplog.records) == 2


def test_a_changed_file_gets_another_copy(tmp_path: Path, data_config: Make) -> None:
    """Of the same size and time: only the bytes tell them apart."""
    path = tmp_path / "x.jsonl.gz"
    text = text_of(1200)
    sizes = set()
    for word, other in ((b"water", "steam"), (b"steam", "water")):
        path.write_bytes(gzip.compress(text.replace(b"water", word), 0, mtime=0))
        os.utime(path, ns=(1, 1))
        sizes.add(path.stat().st_size)
        documents = everything(Scheduler(one_file(data_config, path, tmp_path / "cache")).readers[0])[0]
        texts = [document for group in documents for document in group if document is not None]
        assert any(word.decode() in document for document in texts)
        assert not any(other in document for document in texts)
    assert len(sizes) == 1
    assert len(list((tmp_path / "cache" / "copies").glob("*.blocks"))) == 2


def test_a_folder_that_cannot_be_used_is_one_warning_and_the_same_data(
    tmp_path: Path, data_config: Make, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(zstandard.compress(text_of(1200)))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "copies").write_text("a file where the folder should be")
    found = everything(Scheduler(one_file(data_config, path, tmp_path / "off", cache_max_bytes=0)).readers[0])
    assert everything(Scheduler(one_file(data_config, path, tmp_path / "cache")).readers[0]) == found
    assert [record.message.split(":")[0] for record in caplog.records] == ["data.cache_dir"]
    assert "Set data.cache_dir to a folder with space" in caplog.text


def test_a_full_disk_leaves_no_half_copy(tmp_path: Path, data_config: Make, caplog: pytest.LogCaptureFixture) -> None:
    """`ulimit -f` is a real write error in a real process: the file may not grow past 64 KB."""
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(zstandard.compress(text_of(2500)))
    found = everything(Scheduler(one_file(data_config, path, tmp_path / "off", cache_max_bytes=0)).readers[0])
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    config = one_file(data_config, path, tmp_path / "cache")
    process = context.Process(target=_read_with_small_files, args=(config, queue))
    process.start()
    there, left = queue.get()
    process.join()
    assert there == found
    assert [name for name in left if not name.endswith(".lock")] == []


def _read_with_small_files(config: DataConfig, queue: Any) -> None:
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    found = everything(Scheduler(config).readers[0])
    queue.put((found, os.listdir(Path(config.cache_dir or "") / "copies")))


def test_many_processes_make_one_copy(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(6), context.SimpleQueue()
    workers = [context.Process(target=_open, args=(tmp_path, barrier, queue)) for _ in range(6)]
    for worker in workers:
        worker.start()
    results = [queue.get() for _ in workers]
    for worker in workers:
        worker.join()
    assert len({digest for digest, _ in results}) == 1
    assert sum(made for _, made in results) == 1
    assert [path.suffix for path in (tmp_path / "copies").iterdir() if path.name != "room.lock"] == [".blocks"]


def _open(tmp_path: Path, barrier: Any, queue: Any) -> None:
    made = 0

    def make() -> Iterator[Block]:
        nonlocal made
        made = 1
        yield from blocks(300)

    barrier.wait()
    copy = folder_of(tmp_path).open("k", make, 1_500_000, "file")
    assert copy is not None
    found = [block for part in range(7) for block in copy.blocks(part, 7)]
    queue.put((hash(tuple(sorted(found))) if not found else str(sorted(found))[-200:], made))


def test_a_process_that_dies_while_copying_is_no_obstacle(tmp_path: Path) -> None:
    def die() -> Iterator[Block]:
        yield from blocks(5)
        os._exit(1)

    worker = multiprocessing.get_context("fork").Process(
        target=lambda: folder_of(tmp_path).open("k", die, 1000, "file")
    )
    worker.start()
    worker.join()
    assert list((tmp_path / "copies").glob(".*.half"))
    copy = folder_of(tmp_path).open("k", lambda: blocks(5), 1000, "file")
    assert copy is not None
    assert list(copy.blocks(0, 2)) == list(blocks(5))
    for half in (tmp_path / "copies").glob(".*.half"):
        os.utime(half, (1, 1))
    folder_of(tmp_path).open("other", lambda: blocks(5), 1000, "file")
    assert not list((tmp_path / "copies").glob(".*.half"))


def test_the_oldest_unused_copies_go(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def make(seed: int) -> Callable[[], Iterator[Block]]:
        return lambda: blocks(20, seed)  # 100 KB of noise: as large on disk

    names = {}
    first = folder_of(tmp_path, 350_000)
    for seed in range(3):
        copy = first.open(f"k{seed}", make(seed), 100_000, f"file {seed}")
        assert copy is not None
        names[seed] = copy.path
        os.utime(copy.path, (1000 + seed, 1000 + seed))
    # All three are open in `first`: a fourth has no room, and nothing was removed.
    second = folder_of(tmp_path, 350_000)
    assert second.open("k3", make(3), 200_000, "file 3") is None
    assert "all " in caplog.text
    assert "Raise data.cache_max_bytes" in caplog.text
    assert all(path.exists() for path in names.values())
    first.close()
    os.utime(names[0])  # used again
    third = folder_of(tmp_path, 350_000)
    assert third.open("k3", make(3), 200_000, "file 3") is not None
    assert [names[seed].exists() for seed in range(3)] == [True, False, True]
    assert third.open("huge", make(4), 10_000_000, "huge file") is None
    # What this process made itself and lost is not made over and over.
    made = third.open("k3", make(3), 200_000, "file 3")
    assert made is not None
    third.close()
    made.path.unlink()
    assert third.open("k3", make(3), 200_000, "file 3") is None
    assert "do not fit together" in caplog.text


def test_a_copy_larger_than_it_was_taken_for_is_given_up(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 350_000)
    assert folder.open("k", lambda: blocks(200), 1000, "file") is None
    assert not list((tmp_path / "copies").glob("*.blocks")) + list((tmp_path / "copies").glob(".*.half"))


def test_text_far_larger_than_its_file_is_copied_not_held(
    data_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "HELD_TEXT", 1 << 30)
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(zstandard.compress(b'{"text": "again and again"}\n' * 200_000))
    for number in range(8):
        (tmp_path / f"{number}.jsonl.zst").write_bytes(zstandard.compress(text_of(900)))
    source = {"name": "x", "paths": [str(tmp_path)], "max_reject_fraction": 0.01}
    config = data_config(sources=[source], cache_dir=str(tmp_path / "cache"), chunk_bytes=1024)
    reader = Scheduler(config).readers[0]
    reader._parts._cache.budget = 1 << 20
    documents = everything(reader)[0]
    assert len(list((tmp_path / "cache" / "copies").glob("*.blocks"))) == 1
    assert sum(len(group) for group in documents) == 200_000 + 8 * 901


def test_a_file_that_vanishes_is_named_not_skipped(data_config: Make, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(zstandard.compress(text_of(1200)))
    source = {"name": "x", "paths": [str(path)], "on_error": "stop"}
    scheduler = Scheduler(data_config(sources=[source], cache_dir=str(tmp_path / "cache")))
    path.unlink()
    with pytest.raises(DataError, match=r"x\.jsonl\.zst, record 0: cannot be read: No such file"):
        next(scheduler)
