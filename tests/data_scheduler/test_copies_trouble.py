"""Copies that are damaged, incomplete, too many or out of place, and files that change behind them."""

import gzip
import logging
import multiprocessing
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from large_files import Make, everything, one_file, text_of

from data_scheduler import DataConfig, Scheduler, chunks
from data_scheduler.blocks import Block
from data_scheduler.copies import CopyFolder
from data_scheduler.copy_file import Copy, DamagedCopy
from headrace.errors import DataError

pytestmark = pytest.mark.usefixtures("small_thresholds")


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
