import bz2
import gzip
import io
import itertools
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_scheduler.config import SourceConfig
from data_scheduler.formats.compression import CODECS, decompress
from data_scheduler.formats.records import Records, Unit
from data_scheduler.reading import UnitReader, read_documents
from headrace.errors import ConfigError

PACK = {"gzip": gzip.compress, "zstd": zstandard.compress, "bzip2": bz2.compress, "xz": lzma.compress}
COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress}

NAMES = [
    "x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "x.jsonl.bz2", "x.jsonl.xz", "x.parquet", "x.arrow", "x.csv", "x.csv.gz",
    "x.txt", "x.npy", "x.bin",
]  # fmt: skip


def unit_of(path: Path) -> Unit:
    return Unit(str(path), 0, 1 if path.suffix in (".parquet", ".arrow") else -1)


def read_unit(unit: Unit, format: str, text_key: str, **more: str) -> Records:
    config = {"name": "x", "paths": [unit.path], "format": format, "text_key": text_key, **more}
    return UnitReader(SourceConfig.model_validate(config)).read(unit)


def write(path: Path, data: bytes) -> Unit:
    path.write_bytes(data)
    return Unit(str(path), 0, -1)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_jsonl_reads_every_record_and_names_what_it_cannot_use(tmp_path: Path, suffix: str) -> None:
    lines = [
        b'{"text": "one"}', b"{not json", b"[1]", b'{"title": "x"}', b'{"text": 3}', b'{"text": "\xff"}', b"   ",
        b'{"text": ""}', '{"text": "zwölf"}'.encode(),
    ]  # fmt: skip
    unit = write(tmp_path / f"x.jsonl{suffix}", COMPRESS[suffix](b"\n".join(lines)))
    records = read_unit(unit, "auto", "text")
    assert [text for text in records.documents if text is not None] == ["one", "", "zwölf"]
    assert [reject.record for reject in records.rejects] == [1, 2, 3, 4, 5]
    reasons = [reject.reason for reject in records.rejects]
    for reason, part in zip(
        reasons, ["not valid JSON", "not an object", "missing", "not text", "not valid JSON"], strict=True
    ):
        assert part in reason


@settings(deadline=None)
@given(st.lists(st.text(max_size=30), max_size=20), st.lists(st.integers(0, 400), max_size=6), st.booleans())
def test_byte_ranges_partition_the_lines(tmp_path_factory, texts: list[str], cuts: list[int], newline: bool) -> None:  # type: ignore[no-untyped-def]
    data = b"\n".join(json.dumps({"text": text}, ensure_ascii=False).encode("utf-8", "replace") for text in texts)
    data += b"\n" if newline and data else b""
    path = tmp_path_factory.mktemp("ranges") / "x.jsonl"
    path.write_bytes(data)
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    pieces = [read_unit(Unit(str(path), a, b), "auto", "text").documents for a, b in itertools.pairwise(edges)]
    whole = read_unit(Unit(str(path), 0, -1), "auto", "text").documents
    assert [text for piece in pieces for text in piece] == whole
    assert len(whole) == len(texts)


@pytest.mark.parametrize("kind", ["gzip", "zstd", "bzip2", "xz"])
def test_a_truncated_stream_gives_what_came_before_and_says_so(kind: str) -> None:
    data = b"".join(b'{"text": "%d"}\n' % number for number in range(60_000))
    packed, codec = PACK[kind](data), next(codec for codec in CODECS.values() if codec.name == kind)
    for cut in (len(packed) // 3, len(packed) - 1):
        got, problem = decompress(io.BytesIO(packed[:cut]), codec)
        assert problem is not None
        assert "truncated" in problem
        assert data.startswith(got)
    assert decompress(io.BytesIO(packed), codec) == (data, None)
    assert decompress(io.BytesIO(packed + packed), codec) == (data + data, None)


@pytest.mark.parametrize("kind", ["gzip", "zstd", "bzip2", "xz"])
def test_a_truncated_file_is_one_reject_after_its_good_records(tmp_path: Path, kind: str) -> None:
    data = b"".join(b'{"text": "%d"}\n' % number for number in range(60_000))
    suffix = next(suffix for suffix, codec in CODECS.items() if codec.name == kind)
    packed = PACK[kind](data)
    unit = write(tmp_path / f"x.jsonl{suffix}", packed[: len(packed) // 2])
    records = read_unit(unit, "auto", "text")
    good = [text for text in records.documents if text is not None]
    assert good == [str(number) for number in range(len(good))]
    assert [reject.record for reject in records.rejects] == [len(good)]


def test_parquet_row_groups_nulls_and_a_missing_column(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["a", None, "c", "d"], "n": [1, 2, 3, 4]}), path, row_group_size=2)
    assert list(read_documents(str(path))) == ["a", "c", "d"]
    first = read_unit(Unit(str(path), 0, 1), "auto", "text")
    assert first.documents == ["a", None]
    assert first.rejects[0].record == 1
    assert "columns: text, n" in read_unit(Unit(str(path), 0, 1), "auto", "body").rejects[0].reason
    assert "int64, not text" in read_unit(Unit(str(path), 0, 1), "auto", "n").rejects[0].reason


@pytest.mark.parametrize("name", NAMES)
def test_a_vanished_file_is_a_named_reject(tmp_path: Path, name: str) -> None:
    records = read_unit(unit_of(tmp_path / name), "auto", "text")
    assert len(records.rejects) == 1
    assert "cannot be read" in records.rejects[0].reason


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=300), st.sampled_from(NAMES))
def test_random_bytes_never_crash_a_reader(tmp_path_factory, data: bytes, name: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path_factory.getbasetemp() / f"fuzz-{name}"
    path.write_bytes(data)
    records = read_unit(unit_of(path), "auto", "text")
    assert sum(text is None for text in records.documents) == len(records.rejects)


ROWS = [
    {"text": "eins", "title": "A", "meta": {"lang": "de", "quality": 0.9}, "n": 1},
    {"text": "two", "title": "B", "meta": {"lang": "en", "quality": 0.8}, "n": 2},
    {"text": "drei", "title": None, "meta": {"lang": "de", "quality": 0.95}, "n": 3},
    {"text": "vier", "title": "D", "meta": {"lang": "de", "quality": 0.1}, "n": 4},
    {"text": "five", "title": "E", "meta": {"lang": "de", "quality": None}, "n": 5},
]


def files_of(rows: list[dict[str, Any]], folder: Path) -> list[Unit]:
    """The same rows as jsonl, parquet and Arrow file."""
    table = pa.Table.from_pylist(rows)
    (folder / "x.jsonl").write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    pq.write_table(table, folder / "x.parquet")
    with pa.ipc.new_file(folder / "x.arrow", table.schema) as writer:
        writer.write_table(table)
    return [unit_of(folder / name) for name in ("x.jsonl", "x.parquet", "x.arrow")]


@pytest.mark.parametrize(
    ("settings", "expected", "rejected"),
    [
        ({"where": "meta.lang == 'de' and meta.quality > 0.7"}, ["eins", "drei"], []),
        ({"where": "not meta.lang == 'de' or n in [3, 5]"}, ["two", "drei", "five"], []),
        ({"where": "meta.quality is None"}, ["five"], []),
        ({"where": "1 < n <= 2 + 1"}, ["two", "drei"], []),
        ({"template": "{title}\n\n{text} {n}", "where": "n < 4"}, ["A\n\neins 1", "B\n\ntwo 2"], [2]),
        ({"text_key": "meta.lang"}, ["de", "en", "de", "de", "de"], []),
        ({"text_key": "n"}, [], None),
    ],
)
def test_filters_templates_and_nested_fields_are_the_same_in_every_format(
    tmp_path: Path, settings: dict[str, str], expected: list[str], rejected: list[int] | None
) -> None:
    for unit in files_of(ROWS, tmp_path):
        records = read_unit(unit, "auto", **({"text_key": "text"} | settings))
        assert [document for document in records.documents if document is not None] == expected, unit
        if rejected is None:
            assert records.rejects
        else:
            assert [reject.record for reject in records.rejects] == rejected
            assert len(records.documents) == len(ROWS) == len(expected) + len(rejected) + records.filtered


def test_a_field_of_two_kinds_is_a_reject_not_a_guess(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": "a", "q": 1}, {"text": "b", "q": "high"}, {"text": "c", "q": 3.5}]
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    records = read_unit(unit_of(path), "auto", "text", where="q > 2")
    assert records.documents == [None, None, "c"]
    assert [(reject.record, reject.reason) for reject in records.rejects] == [
        (1, "field 'q' is text, elsewhere a number")
    ]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("where", "__import__('os').system('x')", "is not allowed"),
        ("where", "lang ==", "is not an expression"),
        ("where", "1 == 1", "names no field"),
        ("where", "lang.lower() == 'de'", "is not allowed"),
        ("template", "{text!r}", "write fields as"),
        ("template", "{0}", "write fields as"),
        ("template", "no field", "names no field"),
        ("template", "{text.__class__[0]}", "write fields as"),
    ],
)
def test_expressions_are_checked_when_the_configuration_is_read(key: str, value: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SourceConfig.model_validate({"name": "x", "paths": ["x"], key: value})


def test_comparing_text_with_a_number_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="source 'x': where"):
        read_unit(files_of(ROWS, tmp_path)[0], "auto", "text", where="title > 3")


def test_csv_with_newlines_in_fields_and_a_cut_off_archive(tmp_path: Path) -> None:
    content = b'id,text\n1,"two\nlines"\n2,plain\n' + b"".join(b"%d,row %d\n" % (n, n) for n in range(20_000))
    (tmp_path / "x.csv").write_bytes(content)
    documents = read_unit(unit_of(tmp_path / "x.csv"), "auto", "text").documents
    assert documents[:2] == ["two\nlines", "plain"]
    assert len(documents) == 20_002
    packed = gzip.compress(content)
    (tmp_path / "x.csv.gz").write_bytes(packed[: len(packed) // 2])
    cut = read_unit(unit_of(tmp_path / "x.csv.gz"), "auto", "text")
    good = [document for document in cut.documents if document is not None]
    assert good == documents[: len(good)]
    assert len(cut.rejects) == 1


def test_token_files(tmp_path: Path) -> None:
    eos, documents = 0, [[5, 6, 7], [8], [], [9, 9]]
    config = SourceConfig.model_validate({"name": "x", "paths": ["x"]})
    np.save(tmp_path / "x.npy", np.array([t for d in documents for t in [*d, eos]], np.uint16))
    reader = UnitReader(config, eos_id=eos, vocab_size=10)
    read = reader.read(unit_of(tmp_path / "x.npy")).documents
    assert [document.tolist() for document in read if not isinstance(document, str | None)] == documents
    write_megatron(tmp_path / "x", [[*document, eos] for document in documents])
    read = reader.read(unit_of(tmp_path / "x.bin")).documents
    assert [document.tolist() for document in read if not isinstance(document, str | None)] == documents
    records = UnitReader(config, eos_id=eos, vocab_size=9).read(unit_of(tmp_path / "x.bin"))
    assert [reject.record for reject in records.rejects] == [3]
    assert "outside the tokenizer's vocabulary of 9" in records.rejects[0].reason
    (tmp_path / "x.idx").write_bytes(b"rubbish")
    fresh = UnitReader(config, eos_id=eos, vocab_size=10)
    assert "not a Megatron index" in fresh.read(unit_of(tmp_path / "x.bin")).rejects[0].reason


def write_megatron(stem: Path, documents: list[list[int]]) -> None:
    """As Megatron-LM's IndexedDatasetBuilder does."""
    builder = pytest.importorskip("megatron.core.datasets.indexed_dataset").IndexedDatasetBuilder(
        str(stem) + ".bin", dtype=np.uint16
    )
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(stem) + ".idx")
