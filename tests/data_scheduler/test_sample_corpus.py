"""The sample corpus: real text in four formats, held-out splits that stay apart, the same bytes every time."""

import gzip
import hashlib
import json
import math
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet
import pytest
import zstandard

from data_scheduler import sample_corpus
from data_scheduler.sample_arithmetic import problems
from data_scheduler.sample_corpus import SourceSummary, is_held_out, write_sample_corpus
from headrace.errors import DataError

FORMATS = {"jsonl", "jsonl.zst", "jsonl.gz", "parquet"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[SourceSummary]]:
    out = tmp_path_factory.mktemp("corpus")
    return out, write_sample_corpus(out)


def records(file: Path) -> Iterator[dict[str, str]]:
    if file.suffix == ".parquet":
        yield from pyarrow.parquet.read_table(file).to_pylist()
        return
    data = file.read_bytes()
    if file.suffix == ".zst":
        data = zstandard.ZstdDecompressor().stream_reader(data).read()
    elif file.suffix == ".gz":
        data = gzip.decompress(data)
    yield from map(json.loads, data.splitlines())


def digest(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_size_formats_and_summary(corpus: tuple[Path, list[SourceSummary]]) -> None:
    out, summary = corpus
    assert len(summary) >= 4
    assert {source.suffix for source in summary} == FORMATS
    assert sum(source.bytes for source in summary) >= 15_000_000
    for source in summary:
        files = sorted((out / source.source).iterdir())
        rows = [record for file in files for record in records(file)]
        assert len(files) == source.files
        assert all(file.name.endswith("." + source.suffix) for file in files)
        assert len(rows) == source.documents
        assert sum(len(row["text"].encode()) for row in rows) == source.bytes
        assert len([file for file in files if file.name.startswith("train-")]) >= 2, (
            "several shards, so that chunks exist"
        )


def test_held_out_documents_are_apart(corpus: tuple[Path, list[SourceSummary]]) -> None:
    out, summary = corpus
    held_out_modules = set()
    train_modules = set()
    paths = {}
    for source in summary:
        train = {r["path"] for f in (out / source.source).glob("train-*") for r in records(f)}
        held_out = {r["path"] for f in (out / source.source).glob("val-*") for r in records(f)}
        assert held_out
        assert len(held_out) == source.val_documents
        assert not train & held_out
        assert 0.015 < len(held_out) / (len(train) + len(held_out)) < 0.08
        if source.source in ("code", "prose"):
            train_modules |= train
            held_out_modules |= held_out
        paths[source.source] = train | held_out
    assert len(paths["code"] & paths["prose"]) > 100, "a module's code and docstrings go by one path"
    assert not train_modules & held_out_modules, "a held-out module's docstrings are held out with its code"


def test_records_name_documents_and_no_machine(corpus: tuple[Path, list[SourceSummary]]) -> None:
    out, summary = corpus
    prefix = str(Path(sample_corpus.__file__).resolve().parents[1])
    identifiers = []
    for source in summary:
        for file in (out / source.source).iterdir():
            for record in records(file):
                assert set(record) == {"text", "path", "id"}
                assert record["text"].strip()
                assert not record["path"].startswith("/")
                assert prefix not in record["text"]
                if len(sys.prefix) > len("/usr/local"):
                    assert sys.prefix not in record["text"]
                identifiers.append(record["id"])
    assert len(identifiers) == len(set(identifiers))


def test_same_bytes_again_and_stale_shards_go(corpus: tuple[Path, list[SourceSummary]], tmp_path: Path) -> None:
    out, summary = corpus
    again = tmp_path / "again"
    shutil.copytree(out / "code", again / "code")
    (again / "code" / "train-00099.jsonl.zst").write_bytes(b"left over from a larger corpus")
    assert write_sample_corpus(again) == summary
    assert digest(again) == digest(out)


def test_a_small_installation_is_filled_up_with_arithmetic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "lib"
    (library / "test").mkdir(parents=True)
    for name in ("a.py", "b.py", "test/c.py"):
        (library / name).write_text(f'"""{name}: {"What this module does. " * 20}"""\n')
    monkeypatch.setattr(sample_corpus.sysconfig, "get_path", lambda name: str(library))
    monkeypatch.setattr(sample_corpus, "TOTAL_BYTES", 3_000_000)
    sizes = {source.source: source for source in write_sample_corpus(tmp_path / "out")}
    assert sizes["code"].documents == 2, "no tests"
    assert sum(source.bytes for source in sizes.values()) >= 3_000_000
    assert sizes["arithmetic"].bytes > 1_000_000


def test_an_installation_without_source_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match=r"no standard-library source below .*; use a Python"):
        write_sample_corpus(tmp_path / "out")


def test_the_split_depends_on_the_path_alone() -> None:
    paths = [f"package/module_{i}.py" for i in range(5000)]
    assert 0.03 < sum(map(is_held_out, paths)) / len(paths) < 0.05
    # Fixed for good: a changed rule would leak documents of old validation splits into training.
    assert [i for i, path in enumerate(paths[:150]) if is_held_out(path)] == [40, 101]


def test_every_equation_in_the_arithmetic_holds() -> None:
    equation = re.compile(r"(?<![\w/])(-?\d[\d+*/() -]*?) = (-?\d+(?:/\d+)?)(?=$|[ .,\n])")
    column = re.compile(r"= (\d+), write (\d)(?:, carry (\d))?$", re.MULTILINE)
    checked = 0
    for text in problems(300_000, seed=3):
        assert all(int(total) == int(digit) + 10 * int(carry or 0) for total, digit, carry in column.findall(text))
        for left, right in equation.findall(text):
            if re.search(r"[+*/-]", left):
                assert math.isclose(eval(left), eval(right), rel_tol=1e-12), f"{left} = {right}"
                checked += 1
    assert checked > 5000


def test_arithmetic_follows_the_seed() -> None:
    assert list(problems(20_000, 1)) == list(problems(20_000, 1))
    assert list(problems(20_000, 1)) != list(problems(20_000, 2))
