"""Every kind of bad input in every format that can have it: named, counted, and the rest is read.

Invariant everywhere: records in = documents + rejects + filtered. `fuzz_readers.py` looks for what nobody thought of.
"""

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz_readers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from token_files import write_ds, write_megatron

from data_scheduler import DataConfig, Scheduler
from data_scheduler.config import SourceConfig
from data_scheduler.formats.records import Records, Unit
from data_scheduler.paths import expand
from data_scheduler.reading import UnitReader, whole_file
from headrace.errors import ConfigError, DataError

PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
}  # fmt: skip
COMPRESSED = [suffix for suffix in PACK if suffix]
ROOT = Path(__file__).parents[2]


def read(path: Path, **config: Any) -> Records:
    """All units of a file as one."""
    source = SourceConfig.model_validate({"name": "x", "paths": [str(path)], **config})
    reader = UnitReader(source, eos_id=0, vocab_size=1000)
    try:
        units = whole_file(str(path), source.format)
    except (OSError, ValueError):
        units = [Unit(str(path), 0, 1)]
    found = Records()
    for unit in units:
        records = reader.read(unit)
        fuzz_readers.check(records)
        found.rejects += [reject._replace(record=reject.record + len(found.documents)) for reject in records.rejects]
        found.documents += records.documents
        found.filtered += records.filtered
    return found


def texts(records: Records) -> list[Any]:
    good = [document for document in records.documents if document is not None]
    return [document if isinstance(document, str) else document.tolist() for document in good]


def rejects(records: Records) -> list[tuple[int, str]]:
    return [(reject.record, reject.reason) for reject in records.rejects]


# -- JSON lines -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{broken", "not valid JSON"),
        (b'{"text": "a"} {"text": "b"}', "not valid JSON"),
        (b'{"text": "\xff\xfe"}', "not valid JSON"),
        (b'{"text": "\\ud800"}', "not valid JSON"),
        (b'{"text": "\x00"}', "not valid JSON"),
        (b"\x00" * 50, "not valid JSON"),
        (b'{"text": "a", "n": NaN}', "not valid JSON"),
        (b'{"text": "a", "n": -Infinity}', "not valid JSON"),
        (b'{"text": "a", "n": ' + b"[" * 1200 + b"]" * 1200 + b"}", "longer than"),
        (b'{"text": "a", "n": ' + b"[" * 1100, "not valid JSON"),
        (b'{"text": null}', "'text' is missing"),
        (b'{"body": "a"}', "'text' is missing"),
        (b'{"text": 5}', "'text' is not text"),
        (b'{"text": 123456789012345678901234567890}', "'text' is not text"),
        (b'{"text": ["a"]}', "'text' is not text"),
        (b'"text"', "a str, not an object"),
        (b"null", "a NoneType, not an object"),
        ('{"text": "a"}'.encode("utf-16"), "not valid JSON"),
        (b'{"text": "' + b"x" * 2000 + b'"}', "longer than max_document_bytes=1500"),
    ],
)
def test_a_bad_line_is_one_reject_between_its_neighbours(tmp_path: Path, suffix: str, line: bytes, reason: str) -> None:
    line = line.replace(b"\n", b"")
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(PACK[suffix](b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n'))
    for where in (None, "text != 'nothing'"):
        records = read(path, max_document_bytes=1500, where=where)
        assert texts(records) == ["before", "after"]
        if where and "missing" in reason:  # as in SQL, a comparison with a missing value does not hold
            assert (records.filtered, rejects(records)) == (1, [])
            continue
        ((number, told),) = rejects(records)
        assert number == 1
        assert reason in told or where  # with a filter a field of another kind is rejected for that


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", []),
        (b"\n\n", []),
        (b'\xef\xbb\xbf{"text": "byte order mark"}\n', ["byte order mark"]),
        (b'{"text": "a"}\r\n\r\n{"text": "b"}\r\n', ["a", "b"]),
        (b'{"text": "no newline"}', ["no newline"]),
        (b'{"text": "first", "text": "last"}\n', ["last"]),
        (b'{"text": "", "n": 1e400}\n', None),
        (b'{"text": "\\u0000 and \\ud83d\\ude00"}\n', ["\0 and 😀"]),
        (b'{"text": "a", "n": 123456789012345678901234567890}\n', ["a"]),
        (b'{"text": "a", "n": ' + b"[" * 900 + b"]" * 900 + b"}\n", ["a"]),
    ],
)
def test_odd_but_sound_lines_are_read(tmp_path: Path, suffix: str, data: bytes, expected: list[str] | None) -> None:
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(PACK[suffix](data))
    records = read(path)
    if expected is None:  # JSON that says so may be refused or read, but not lost
        assert len(texts(records)) + len(rejects(records)) == 1
    else:
        assert (texts(records), rejects(records)) == (expected, [])


def test_numbers_that_no_double_holds_do_not_slip_into_a_text(tmp_path: Path) -> None:
    rows = [
        b'{"text": "a", "n": 9007199254740993}',
        b'{"text": "b", "n": 123456789012345678901}',
        b'{"text": "c", "n": 1.5}',
    ]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(rows))  # fmt: skip
    records = read(tmp_path / "x.jsonl", template="{n}")
    assert texts(records) == ["9007199254740993", "1.5"]
    assert "past 64 bits" in records.rejects[0].reason
    assert texts(read(tmp_path / "x.jsonl", where="n > 2")) == ["a", "b"]


def test_a_filter_that_fails_on_one_row_rejects_that_row(tmp_path: Path) -> None:
    rows = [{"text": "a", "n": 6, "m": 2}, {"text": "b", "n": 6, "m": 0}, {"text": "c", "n": 1, "m": 2}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    records = read(tmp_path / "x.jsonl", where="n / m > 2")
    assert texts(records) == ["a"]
    assert records.filtered == 1
    assert rejects(records) == [(1, "where: divide by zero")]


# -- streams --------------------------------------------------------------------------------------------------------

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


# -- columns --------------------------------------------------------------------------------------------------------


def write_columns(path: Path, table: pa.Table, rows: int = 2) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(
            table, path, row_group_size=rows, write_page_checksum=True, use_dictionary=False, compression="none"
        )
    else:
        kind = pa.ipc.new_stream if path.name.startswith("stream") else pa.ipc.new_file
        with kind(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=rows)
    return path


COLUMN_FILES = ["x.parquet", "x.arrow", "stream.arrow"]


@pytest.mark.parametrize("name", COLUMN_FILES)
def test_columns_of_the_wrong_kind(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_columns(path, pa.table({"text": ["a", None, "c"]}))
    assert (texts(read(path)), rejects(read(path))) == (["a", "c"], [(1, "no text (null)")])
    assert [reason for _, reason in rejects(read(path, text_key="body"))] == ["no column 'body' (columns: text)"] * 2
    write_columns(path, pa.table({"text": pa.array([b"a", b"b"], pa.binary())}))
    assert rejects(read(path)) == [(0, "column 'text' holds binary, not text")]
    write_columns(path, pa.table({"text": pa.array([], pa.string())}))
    assert rejects(read(path)) == []
    write_columns(path, pa.table({"text": pa.array(["a", "b", "c"]).dictionary_encode()}))
    assert texts(read(path)) == ["a", "b", "c"]
    invalid = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(np.array([0, 1, 3, 4], "<i4").tobytes()), pa.py_buffer(b"a\xff\xfeb")]
    )
    write_columns(path, pa.table({"text": invalid}), rows=3)
    assert (texts(read(path)), rejects(read(path))) == (["a", "b"], [(1, "text is not valid UTF-8")])
    if path.suffix == ".arrow":
        write_columns(path, pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]))
        assert rejects(read(path)) == [(0, "column 'text' is there 2 times")]


@pytest.mark.parametrize("name", COLUMN_FILES)
def test_dates_that_python_cannot_hold_are_rejects(tmp_path: Path, name: str) -> None:
    when = pa.array([0, 1 << 60, 5], pa.timestamp("us"))
    path = write_columns(tmp_path / name, pa.table({"text": ["a", "b", "c"], "when": when}), rows=3)
    records = read(path, template="{text} {when}")
    assert texts(records) == []
    assert [number for number, _ in rejects(records)] == [0, 1, 2]
    assert texts(read(path)) == ["a", "b", "c"]


def test_a_corrupt_parquet_page_rejects_its_row_group_only(tmp_path: Path) -> None:
    path = write_columns(tmp_path / "x.parquet", pa.table({"text": [f"row number {n}" for n in range(6)]}))
    data = path.read_bytes()
    at = data.index(b"row number 2\x0c")  # followed by the next value's length: the page, not its statistics
    path.write_bytes(data[:at] + b"ROW" + data[at + 3 :])
    records = read(path)
    assert texts(records) == [f"row number {n}" for n in (0, 1, 4, 5)]
    ((number, reason),) = rejects(records)
    assert number == 2
    assert "not readable" in reason


def test_an_arrow_file_with_offsets_outside_its_buffer(tmp_path: Path) -> None:
    path = write_columns(tmp_path / "x.arrow", pa.table({"text": ["first", "second"]}))
    data = path.read_bytes()
    good, bad = (np.array(offsets, "<i4").tobytes() for offsets in ([0, 5, 11], [0, 5, 1 << 30]))
    assert data.count(good) == 1
    path.write_bytes(data.replace(good, bad))
    records = read(path)
    assert texts(records) == []
    assert len(rejects(records)) == 1


def test_arrow_streams_are_read_as_datasets_keeps_them(tmp_path: Path) -> None:
    path = write_columns(tmp_path / "stream.arrow", pa.table({"text": list("abcde")}))
    assert texts(read(path)) == list("abcde")
    path.write_bytes(path.read_bytes()[:-60])
    assert texts(read(path)) == list("abcd")
    assert len(rejects(read(path))) == 1


@pytest.mark.parametrize("name", [*COLUMN_FILES, "x.npy", "x.bin", "x.ds", "x.jsonl.gz", "x.csv", "x.txt"])
def test_empty_files_and_rubbish(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"")
    assert texts(read(path)) == ([""] if name == "x.txt" else [])
    path.write_bytes(b"\xffrubbish" * 100)
    records = read(path)
    assert texts(records) == []
    assert rejects(records)
    path.unlink()
    assert "No such file" in rejects(read(path))[0][1]


# -- CSV ------------------------------------------------------------------------------------------------------------


def test_csv_oddities(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(
        b"\xef\xbb\xbfid,text\r\n1,fine\r\n2,too,many\r\n3\r\n4,\xff\xfe\r\n5,\xff,many\r\n6,007\r\n7,NA\r\n8,\r\n"
        b"9,nul \0 byte\r\n"
    )
    records = read(path)
    assert texts(records) == ["fine", "007", "NA", "", "nul \0 byte"]
    assert [reason for _, reason in rejects(records)] == [
        "text is not valid UTF-8", "3 fields, not 2", "1 fields, not 2", "3 fields, not 2",
    ]  # fmt: skip
    assert texts(read(path, where="id > 5")) == ["007", "NA", "", "nul \0 byte"]
    path.write_bytes(b"text\n123\n456\n")
    assert texts(read(path)) == ["123", "456"]
    path.write_bytes(b'text\n"never closed\nrow\n')
    assert len(texts(read(path))) + len(rejects(read(path))) == 1
    path.write_bytes(b"text\n")
    assert (texts(read(path)), rejects(read(path))) == ([], [])


# -- token files ----------------------------------------------------------------------------------------------------


def test_token_files_that_are_cut_or_lie(tmp_path: Path) -> None:
    documents = [[5, 6, 0], [7, 0], [8, 9, 0]]
    write_megatron(tmp_path / "x", documents)
    write_ds(tmp_path / "x.ds", documents)
    for name in ("x.bin", "x.ds"):
        path = tmp_path / name
        data = path.read_bytes()
        path.write_bytes(data[:-2])
        records = read(path)
        assert texts(records) == [[5, 6], [7]]
        assert rejects(records) == [(2, "the index points past the end of the file")]
        path.write_bytes(data[:2] + b"\xff\xff" + data[4:])
        records = read(path)
        assert texts(records) == [[7], [8, 9]]
        assert rejects(records) == [(0, "token id 65535 is outside the tokenizer's vocabulary of 1000")]
    (tmp_path / "x.idx").unlink()
    assert "No such file" in rejects(read(tmp_path / "x.bin"))[0][1]
    np.save(tmp_path / "x.npy", np.array([5, 6, 0, 7, 0, 8, 9], "<u2"))
    data = (tmp_path / "x.npy").read_bytes()
    for changed, expected, reason in (
        (data, [[5, 6], [7], [8, 9]], None),
        (data[:-3], [[5, 6], [7]], "cut off: 5 of 7 tokens"),
        (data + b"xy", [[5, 6], [7], [8, 9]], "2 bytes follow the array"),
        (data.replace(b"(7,)", b"(1 <"), [], "not a .npy array"),
        (data.replace(b"(7,), }     ", b"(1" + b"0" * 7 + b",)}"), [[5, 6], [7]], "cut off: 7 of 10000000 tokens"),
        (data.replace(b"<u2", b"<f2"), [], "an array of float16"),
    ):
        (tmp_path / "x.npy").write_bytes(changed)
        records = read(tmp_path / "x.npy")
        assert texts(records) == expected
        assert [part in rejects(records)[0][1] for part in [reason] if part] == [True] * (reason is not None)
        assert len(rejects(records)) == (reason is not None)


# -- whole runs -----------------------------------------------------------------------------------------------------


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
