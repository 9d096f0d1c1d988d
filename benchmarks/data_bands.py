"""What bands cost: CPU time of a token, of a source in N bands beside the same source in one piece.

    python benchmarks/data_bands.py

A source is written as plain `.jsonl`, `.jsonl.zst` and parquet, with a number `q` that has nothing to do with the text,
and read through the scheduler for two epochs, all bands with the same share: the first epoch pays for reading it once
for each band, and fills the token cache where there is one; with it the second shows what is left. The best of
`--repeats`, arms in turn; one core.
"""

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from loading.result import circumstances, result_options, versions, write_result
from policy_overhead import make_corpus

from data_scheduler import DataConfig, Scheduler

RESULT = Path(__file__).parent / "results" / "data_bands.json"
FORMATS = ("x.jsonl", "x.jsonl.zst", "x.parquet")
BANDS = (1, 2, 4)
SEQ_LEN, BATCH, LANES = 2048, 16, 16


def write_source(folder: Path, megabytes: int) -> int:
    """The source in every format; its bytes of text."""
    make_corpus(folder, 1)
    texts = [orjson.loads(line)["text"] for line in (folder / "s00.jsonl").read_bytes().splitlines()]
    rng, rows, size = random.Random(0), [], 0
    while size < megabytes << 20:
        rows.append({"text": rng.choice(texts), "q": rng.random()})
        size += len(rows[-1]["text"])
    lines = b"".join(orjson.dumps(row) + b"\n" for row in rows)
    (folder / "x.jsonl").write_bytes(lines)
    (folder / "x.jsonl.zst").write_bytes(zstandard.compress(lines))
    pq.write_table(pa.Table.from_pylist(rows), folder / "x.parquet", row_group_size=max(1, len(rows) // 4))
    return size


def read(folder: Path, name: str, bands: int, cache: Path | None) -> tuple[float, float, int]:
    """(CPU seconds of the first epoch, of the second, tokens of an epoch)."""
    source: dict[str, Any] = {"name": "s", "paths": [str(folder / name)]}
    if bands > 1:
        source["bands"] = {"by": "q", "count": bands}
    config = {
        "tokenizer": str(folder / "tokenizer.json"), "sources": [source], "prefetch": 0, "lanes": LANES,
        "global_batch_size": BATCH, "seq_len": SEQ_LEN, "cache_dir": str(folder / "cache"),
        "token_cache": None if cache is None else str(cache),
    }  # fmt: skip
    scheduler = Scheduler(DataConfig.model_validate(config))
    times, tokens, epoch = [], 0, 1
    began = time.process_time()
    while epoch <= 2:
        tokens += int(next(scheduler).tokens.size)
        places = [scheduler.place(lane, number)[0].epoch for lane in range(LANES) for number in range(bands)]
        if sum(places) >= epoch * len(places):
            times.append(time.process_time() - began)
            began, epoch = time.process_time(), epoch + 1
    return times[0], times[1], tokens // 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=12, help="text of the source")
    parser.add_argument("--repeats", type=int, default=3)
    result_options(parser, RESULT)
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        text = write_source(folder, given.megabytes)
        for name in FORMATS:
            seconds: dict[int, list[tuple[float, float]]] = {bands: [] for bands in BANDS}
            for repeat in range(given.repeats):
                for bands in BANDS:
                    first, _, tokens = read(folder, name, bands, None)
                    _, cached, _ = read(folder, name, bands, folder / f"tokens-{name}-{bands}-{repeat}")
                    seconds[bands].append((first / tokens, cached / tokens))
            one = [min(times) for times in zip(*seconds[1], strict=True)]
            for bands in BANDS:
                first, cached = (min(times) for times in zip(*seconds[bands], strict=True))
                rows.append(
                    {
                        "format": name.removeprefix("x"),
                        "bands": bands,
                        "tokens_per_cpu_s": round(1 / first),
                        "of_one": round(first / one[0], 2),
                        "cached_tokens_per_cpu_s": round(1 / cached),
                        "cached_of_one": round(cached / one[1], 2),
                    }
                )
                print(rows[-1], flush=True)
    result = {
        **circumstances("data_bands.py"),
        "versions": versions(["numpy", "pyarrow", "orjson", "zstandard", "gigatoken"]),
        "text_bytes": text,
        "rows": rows,
    }
    write_result(given.out, result)


if __name__ == "__main__":
    main()
