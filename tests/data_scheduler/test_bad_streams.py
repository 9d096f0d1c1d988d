"""Compressed files with a bad end, files that expand beyond reason, documents that are too long."""

import bz2
import gzip
import json
import lzma
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from read_records import COMPRESSED, PACK, read, rejects, texts

ROOT = Path(__file__).parents[2]


ENDINGS = {
    "cut": lambda data: data[:-7],
    "garbage": lambda data: data + b"garbage",
    "zeros": lambda data: data + b"\0" * 99,
}


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".txt"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_stream_with_a_bad_end(tmp_path: Path, suffix: str, kind: str, ending: str) -> None:
    count = 3000
    rows = [f"row {number} {number * 7919 % 1000}" for number in range(count)]
    data = {
        ".jsonl": "".join(json.dumps({"text": row}) + "\n" for row in rows),
        ".csv": "text\n" + "".join(f"{row}\n" for row in rows),
        ".txt": "\n".join(rows),
    }[kind].encode()
    path = tmp_path / f"x{kind}{suffix}"
    path.write_bytes(ENDINGS[ending](PACK[suffix](data)))
    records = read(path)
    if ending == "zeros":  # padding is legal
        assert rejects(records) == []
        assert len(texts(records)) == (1 if kind == ".txt" else count)
        return
    ((number, reason),) = rejects(records)
    assert "stream" in reason
    assert number == len(texts(records))
    if kind == ".txt":  # part of a document is no document
        assert texts(records) == []
    else:
        assert texts(records) == rows[: len(texts(records))]
        assert ending == "cut" or len(texts(records)) == count


def bomb(suffix: str, size: int) -> bytes:
    if suffix == ".zst":
        return zstandard.compress(b" " * size)
    packer = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lambda data: lzma.compress(data, preset=0)}[suffix]
    return packer(b" " * size)


MEASURE = """
import resource, sys
from data_scheduler.config import SourceConfig
from data_scheduler.formats.records import Unit
from data_scheduler.paths import expand
from data_scheduler.reading import UnitReader, whole_file
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
for path in sys.argv[1:]:
    reader = UnitReader(SourceConfig.model_validate({"name": "x", "paths": [path]}))
    before = peak()
    records = [reader.read(unit) for unit in whole_file(path)]
    reasons = [reject.reason for found in records for reject in found.rejects]
    print(peak() - before, sum(len(d) for found in records for d in found.documents if d), *reasons, sep="|")
"""


def measure(*paths: Path) -> list[list[str]]:
    """(bytes of memory that reading took at its peak, characters read, reasons) per file, in a process of its own."""
    command = [sys.executable, "-c", MEASURE, *map(str, paths)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return [line.split("|") for line in result.stdout.splitlines()]


@pytest.mark.parametrize(
    ("kind", "suffix"), [(".jsonl", suffix) for suffix in COMPRESSED] + [(".txt", ".zst"), (".csv", ".zst")]
)
def test_a_stream_that_expands_beyond_reason_is_given_up(tmp_path: Path, suffix: str, kind: str) -> None:
    path = tmp_path / f"x{kind}{suffix}"
    path.write_bytes(bomb(suffix, 100 << 20))
    ((memory, read, *reasons),) = measure(path)
    assert int(memory) < 350 << 20
    assert int(read) == 0
    assert any("expands more than 250 times" in reason for reason in reasons)


def test_a_parquet_file_that_expands_beyond_reason_is_given_up(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    table = pa.table({"text": ["x" * (1 << 20)] * 200})
    pq.write_table(table, path, compression="zstd", use_dictionary=False)
    ((memory, read, *reasons),) = measure(path)
    assert (int(read), len(reasons)) == (0, 1)
    assert "expands more than 250 times" in reasons[0]
    assert int(memory) < 100 << 20


def test_a_line_of_100_mb_is_read_within_four_times_its_size_or_rejected(tmp_path: Path) -> None:
    size = 99_000_000
    for name, length in (("x.jsonl", size), ("long.jsonl", 2 * size)):
        with open(tmp_path / name, "wb") as file:
            file.write(b'{"text": "a"}\n{"text": "' + b"wheel " * (length // 6) + b'"}\n{"text": "b"}\n')
    for name in ("x.jsonl", "long.jsonl"):
        ((memory, read, *reasons),) = measure(tmp_path / name)
        assert int(memory) < 4 * size
        if name == "x.jsonl":
            assert (int(read), reasons) == (size // 6 * 6 + 2, [])
        else:
            assert int(read) == 2
            assert len(reasons) == 1
            assert "longer than max_document_bytes=100000000" in reasons[0]


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet", "x.arrow", "x.csv", "x.txt"])
def test_too_long_documents_in_every_format(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    rows = [{"text": text} for text in ("short", "ü" * 51, "ü" * 40)]
    table = pa.Table.from_pylist(rows)
    match path.suffix:
        case ".jsonl":
            path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
        case ".parquet":
            pq.write_table(table, path)
        case ".arrow":
            with pa.ipc.new_file(path, table.schema) as writer:
                writer.write_table(table)
        case ".csv":
            path.write_text("text\n" + "\n".join(row["text"] for row in rows))
        case ".txt":
            path.write_text(rows[1]["text"])
    records = read(path, max_document_bytes=100)
    assert texts(records) == ([] if name == "x.txt" else ["short", "ü" * 40])
    ((number, reason),) = rejects(records)
    assert number == (0 if name == "x.txt" else 1)
    assert "longer than max_document_bytes=100" in reason
