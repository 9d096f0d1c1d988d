"""How long a run with very many files, or with one large compressed file, takes to begin; printed and written as JSON.

    python benchmarks/data_index.py

Makes 10,000 small files of each kind and one large `.jsonl.zst`, all from generated text, in a temporary folder. Times
are wall-clock seconds with files in the page cache, in a process that has its imports behind it; every start is a
process of its own. `cold`: nothing kept from an earlier start. `warm`: the index is there, and the copies.
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from loading.result import circumstances, result_options, write_result
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from data_scheduler import DataConfig, Scheduler
from data_scheduler.blocks import cut
from data_scheduler.copy_file import Copy, write_copy
from data_scheduler.encoder import load_encoder
from data_scheduler.formats.compression import CODECS, decoded
from data_scheduler.journal import Journal
from data_scheduler.layout_index import LayoutIndex
from data_scheduler.manifest import Manifest, check_unchanged

RESULT = Path(__file__).parent / "results" / "data_index.json"
FILES = 10_000
LARGE_BYTES = 512 << 20
MILLION = 1_000_000


def documents(rng: random.Random, words: list[str], count: int) -> list[str]:
    """Text with the statistics of text: words by rank, 30 to 3,000 of them."""
    ranks = [1 / (rank + 2) for rank in range(len(words))]
    return [" ".join(rng.choices(words, ranks, k=min(3000, int(30 * rng.paretovariate(1.1))))) for _ in range(count)]


def make_corpus(folder: Path) -> None:
    """`jsonl/`, `parquet/`, `large/` and tokenizer.json."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlucmfwypvbgkjqxz", k=rng.randint(2, 10))) for _ in range(20_000)]
    texts = documents(rng, words, 2_000)
    for number in range(FILES):
        name = f"{number // 100:03d}/part-{number:05d}"
        own = texts[number % 1990 : number % 1990 + 8]
        for kind in ("jsonl", "parquet"):
            path = folder / kind / f"{name}.{kind}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "jsonl":
                path.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in own))
            else:
                pq.write_table(pa.table({"text": own}), path)
    (folder / "large").mkdir()
    lines = [orjson.dumps({"text": text}) + b"\n" for text in texts]
    packer, written = zstandard.ZstdCompressor(level=3), 0
    with open(folder / "large" / "0.jsonl.zst", "wb") as file, packer.stream_writer(file) as stream:
        while written < LARGE_BYTES:
            rng.shuffle(lines)
            written += sum(stream.write(line) or len(line) for line in lines)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts[:300], trainers.BpeTrainer(vocab_size=8000, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    old = time.time() - 60
    for path in folder.glob("*/*/*"):
        os.utime(path, (old, old))  # files that have settled; younger ones are not kept in the index


def in_a_process(measure: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """The result of `measure` in a fresh fork, so that nothing is left in memory from the one before."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=lambda: queue.put(measure(*arguments)))
    process.start()
    result: dict[str, float] = queue.get()
    process.join()
    return result


def config_of(folder: Path, kind: str, **more: Any) -> DataConfig:
    source = {"name": kind, "paths": [str(folder / kind)]}
    return DataConfig.model_validate(
        {
            "tokenizer": str(folder / "tokenizer.json"),
            "sources": [source],
            "prefetch": 0,
            "cache_dir": str(folder / "cache"),
            **more,
        }
    )


def start(folder: Path, kind: str, run: str, more: dict[str, Any]) -> dict[str, float]:
    """Seconds from nothing to a scheduler, and from there to the first and the following batches of 240 sequences."""
    config = config_of(folder, kind, **more)
    encoder = load_encoder(config.tokenizer)
    begun, begun_cpu = time.perf_counter(), time.process_time()
    scheduler = Scheduler(config, run_dir=folder / run, encoder=encoder)
    opened, opened_cpu = time.perf_counter(), time.process_time()
    next(scheduler)
    first = time.perf_counter()
    for _ in range(4):
        next(scheduler)
    return {
        "start_s": round(opened - begun, 3),
        "start_cpu_s": round(opened_cpu - begun_cpu, 3),
        "first_batch_s": round(first - opened, 3),
        "next_batches_s": round((time.perf_counter() - first) / 4, 3),
    }


def index_times(folder: Path, kind: str) -> dict[str, float]:
    """Seconds of each part of a start, cold and warm."""
    source = config_of(folder, kind).sources[0]
    times: dict[str, float] = {}
    begun = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal begun
        times[name] = round(time.perf_counter() - begun, 3)
        begun = time.perf_counter()

    Manifest.take(source, LayoutIndex(folder / "parts.sqlite"))
    lap("take_cold_s")
    manifest = Manifest.take(source, LayoutIndex(folder / "parts.sqlite"))
    lap("take_warm_s")
    check_unchanged(manifest)
    lap("check_unchanged_s")
    journal = Journal(folder / f"{kind}.journal")
    event = journal.append("manifest", 0, manifest.to_data(), "system")
    lap("journal_s")
    Manifest.from_data(event.data)
    lap("read_back_s")
    times["journal_bytes"] = len(event.line())
    return times


def million() -> dict[str, float]:
    """What a manifest of a million files costs; listing them is not in it."""
    files = [(f"/data/crawl/{n // 1000:04d}/part-{n:07d}.jsonl.zst", 50_000_000 + n) for n in range(MILLION)]
    manifest = Manifest("web", files, {})
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        event = Journal(Path(folder) / "journal.jsonl").append("manifest", 0, manifest.to_data(), "system")
        written = time.perf_counter()
        Manifest.from_data(Journal(Path(folder) / "journal.jsonl", writable=False).events[0].data)
    return {
        "journal_bytes": len(event.line()),
        "journal_s": round(written - begun, 2),
        "read_back_s": round(time.perf_counter() - written, 2),
    }


def copying(folder: Path) -> dict[str, float]:
    """MB of text per second of CPU: decompressing alone, and a whole copy; and what it takes on disk and in memory."""
    path = next((folder / "large").iterdir())
    begun = time.process_time()
    with open(path, "rb") as file:
        text = sum(len(piece) for piece in decoded(file, CODECS[".zst"]))
    decompressed = time.process_time()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open(path, "rb") as file, open(folder / "copy", "wb") as copy:
        for _ in write_copy(copy, "key", cut(decoded(file, CODECS[".zst"]), 1 << 20, 100_000_000)):
            pass
    copied = time.process_time()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    opened = Copy(folder / "copy", "key")
    for part in range(100):
        for _ in opened.blocks(part, 100):
            pass
    return {
        "text_bytes": text,
        "compressed_bytes": path.stat().st_size,
        "copy_bytes": opened.size,
        "memory_added_bytes": memory << 10,
        "decompress_mb_per_cpu_s": round(text / 1e6 / (decompressed - begun)),
        "copy_mb_per_cpu_s": round(text / 1e6 / (copied - decompressed)),
        "read_copy_mb_per_cpu_s": round(text / 1e6 / (time.process_time() - copied)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    result_options(parser, RESULT)
    options = parser.parse_args()
    results: dict[str, Any] = {"files": FILES, "kinds": {}}
    folder = Path(tempfile.mkdtemp(prefix="headrace-index-"))
    try:
        make_corpus(folder)
        for kind in ("jsonl", "parquet"):
            found = {"parts": in_a_process(index_times, folder, kind)}
            for state in ("cold", "warm"):
                found[state] = in_a_process(start, folder, kind, f"{kind}-{state}", {})
            results["kinds"][kind] = found
            print(kind, json.dumps(found), flush=True)
        results["million_files"] = in_a_process(million)
        print("a million files", json.dumps(results["million_files"]), flush=True)
        results["copying"] = in_a_process(copying, folder)
        print("copying", json.dumps(results["copying"]), flush=True)
        large = {}
        for state in ("cold", "warm"):
            large[state] = in_a_process(start, folder, "large", f"large-{state}", {})
        # Without copies each of 240 lanes decompresses the whole file for its first chunk; twelve are enough to see it.
        few = {"lanes": 12, "global_batch_size": 12}
        for state, more in (("warm_12_lanes", few), ("without_copies_12_lanes", {**few, "cache_max_bytes": 0})):
            in_a_process(start, folder, "large", f"large-{state}-0", few)
            large[state] = in_a_process(start, folder, "large", f"large-{state}", more)
        results["large_file"] = large
        print("large file", json.dumps(large), flush=True)
    finally:
        shutil.rmtree(folder)
    write_result(options.out, {**circumstances("data_index.py"), "results": results})


if __name__ == "__main__":
    main()
