"""Files that are large where 16 KB of text are, compressed in every way; shared by the tests of copies."""

import bz2
import gzip
import itertools
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from small_corpus import WORDS

from data_scheduler import DataConfig, Scheduler, batch_sha256, chunks, copies
from data_scheduler.formats import compression
from data_scheduler.formats.compression import Codec
from data_scheduler.source import SourceReader

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


@pytest.fixture
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
