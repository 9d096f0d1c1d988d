"""Bad input in whole runs: named, counted, and the rest is read.

The formats one by one: `test_bad_lines.py`, `test_bad_streams.py`, `test_bad_columns.py`. Invariant everywhere:
records in = documents + rejects + filtered. `fuzz_readers.py` looks for what nobody thought of.
"""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import fuzz_readers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from read_records import read

from data_scheduler import DataConfig, Scheduler
from data_scheduler.config import SourceConfig
from data_scheduler.paths import expand
from headrace.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]


def scheduler(folder: Path, corpus: Path, **source: Any) -> Scheduler:
    config = {
        "tokenizer": str(corpus / "tokenizer.json"), "seq_len": 32, "global_batch_size": 8, "lanes": 4, "prefetch": 0,
        "sources": [{"name": "web", "paths": [str(folder)], "max_reject_fraction": 1.0, **source}],
    }  # fmt: skip
    return Scheduler(DataConfig.model_validate(config))


@pytest.mark.parametrize("change", ["vanished", "shrunk", "grown"])
@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.parquet", "x.npy"])
def test_a_file_that_changes_during_a_run_is_named(tmp_path: Path, corpus: Path, change: str, name: str) -> None:
    lines = b"".join(json.dumps({"text": f"water {n}"}).encode() + b"\n" for n in range(500))
    (tmp_path / "a.jsonl").write_bytes(lines)
    path = tmp_path / name
    match name:
        case "x.jsonl":
            path.write_bytes(lines)
        case "x.jsonl.gz":
            path.write_bytes(gzip.compress(lines))
        case "x.parquet":
            pq.write_table(pa.table({"text": ["water"] * 500}), path)
        case "x.npy":
            np.save(path, np.array([5, 6, 0] * 500, np.uint16))
    running = scheduler(tmp_path, corpus)
    data = path.read_bytes()
    if change == "vanished":
        path.unlink()
    else:
        path.write_bytes(data[:-10] if change == "shrunk" else data + data)
    found = {reject for _ in range(60) for reject in next(running).rejects}
    assert {reject.source for reject in found} == {"web"}
    assert {reject.file for reject in found} == {str(path)}
    expected = "No such file" if change == "vanished" else f"{len(data)} when it entered the run"
    assert all(expected in reject.reason for reject in found)


def test_the_limit_and_stop_name_the_record(tmp_path: Path, corpus: Path) -> None:
    lines = b"".join(json.dumps({"text": f"water {n}"}).encode() + b"\n" for n in range(2000))
    (tmp_path / "x.jsonl").write_bytes(lines + b"{broken\n" * 100)
    with pytest.raises(DataError, match=r"^source 'web': .*x\.jsonl, record \d+.*not valid JSON.*on_error is `stop`"):
        running = scheduler(tmp_path, corpus, on_error="stop")
        for _ in range(200):
            next(running)
    with pytest.raises(DataError, match=r"^source 'web': \d+ of \d+ records rejected.*x\.jsonl, record \d+"):
        running = scheduler(tmp_path, corpus, max_reject_fraction=0.001)
        for _ in range(300):
            next(running)


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "x.bin"])
def test_a_file_without_a_readable_layout_is_one_line(tmp_path: Path, corpus: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"rubbish" * 100)
    (tmp_path / "x.idx").write_bytes(b"rubbish" * 100)
    with pytest.raises(DataError, match=rf"^source 'web': .*{name}: not readable: \S") as caught:
        scheduler(tmp_path, corpus, on_error="stop")
    assert "\n" not in str(caught.value)


def test_unknown_formats_are_refused_with_the_list() -> None:
    with pytest.raises(ValueError, match="datatrove:warc"):
        SourceConfig.model_validate({"name": "x", "paths": ["x"], "format": "datatrove:huggingface"})
    with pytest.raises(ConfigError, match="decompress it once"):
        read(Path("x.parquet.gz"))


def test_files_that_cannot_be_named_or_found(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"x\.jsonl: No such file or directory \(a link"):
        expand([f"{tmp_path}/*.jsonl"], "x")
    (tmp_path / "y").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/y/\xff.jsonl")).write_bytes(b"{}")
    with pytest.raises(ConfigError, match="is not UTF-8; rename it"):
        expand([f"{tmp_path}/y"], "x")


def test_fuzzed_files_never_break_a_reader() -> None:
    """A small part of what `python tests/data_scheduler/fuzz_readers.py` does."""
    ends, failed = fuzz_readers.fuzz(1500, seed=0)
    assert not failed
    assert sum(ends.values()) == 1500
    assert ends["read"] > 50
    assert ends["rejects"] > 500
