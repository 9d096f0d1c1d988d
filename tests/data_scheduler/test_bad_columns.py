"""Parquet, Arrow and token files that are damaged, lie, or hold something else: row groups are rejected, not files."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from read_records import read, rejects, texts, write_columns
from token_files import write_ds, write_megatron

from data_scheduler.reading import column_layout

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
    good, bad = (np.array(offsets, "<i4").tobytes() for offsets in ([0, 5, 11], [0, 1 << 30, 11]))
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


def test_an_index_that_claims_more_than_there_is(tmp_path: Path) -> None:
    """Neither a billion chunks nor a document twice: an index of 1 MB could ask for a terabyte."""
    write_megatron(tmp_path / "x", [[5] * 100] * 50)
    index = (tmp_path / "x.idx").read_bytes()
    offsets = 34 + 4 * 50
    whole = np.full(50, 5000, "<i4").tobytes()
    overlapping = index[:34] + whole + b"\0" * (8 * 50) + index[offsets + 8 * 50 :]
    (tmp_path / "x.idx").write_bytes(overlapping)
    assert rejects(read(tmp_path / "x.bin")) == [(0, "the documents of the index overlap")]
    huge = np.full(50, (1 << 31) - 1, "<i4").tobytes()
    (tmp_path / "x.idx").write_bytes(index[:34] + huge + index[offsets:])
    layout = column_layout(str(tmp_path / "x.bin"))
    assert layout is not None
    assert max(text for _, text in layout) <= 10_000
    assert len(rejects(read(tmp_path / "x.bin"))) == 50
    path = write_columns(tmp_path / "x.parquet", pa.table({"text": ["water"] * 4}), rows=4)
    assert column_layout(str(path)) == [(4, pq.ParquetFile(path).metadata.row_group(0).total_byte_size)]
