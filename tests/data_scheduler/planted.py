"""A raw corpus with a planted reason for every removal, its preparation, and what came out.

datatrove is imported where it is used: tests without it find this file too.
"""

import gzip
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_scheduler.prep.config import PrepConfig

STOP_WORDS = ["the", "of", "and", "to", "with", "that"]


def page(seed: object, words: int = 150) -> str:
    """Prose as far as a filter can tell: sentences of made-up words and stop words."""
    rng = random.Random(f"page {seed}")
    syllables = ["ra", "mil", "lo", "stre", "gan", "tor", "wei", "sa", "dun", "pel"]
    made = ["".join(rng.choices(syllables, k=rng.randint(2, 3))) for _ in range(words)]
    tokens = [rng.choice(STOP_WORDS) if rng.random() < 0.3 else word for word in made]
    lines = [" ".join(tokens[at : at + 10]).capitalize() + "." for at in range(0, words, 10)]
    return "\n".join(" ".join(lines[at : at + 5]) for at in range(0, len(lines), 5))


def near(text: str) -> str:
    """The same page with two words changed."""
    words = text.split(" ")
    return " ".join("weir" if at in (30, 32) else word for at, word in enumerate(words))


GOOD = {f"good-{number}": page(number, 120 + 10 * (number % 5)) for number in range(24)}
SHORT = {f"short-{number}": page(f"short {number}", 20) for number in range(3)}
SYMBOLS = {"symbols-0": " # ".join(page("symbols").split(" "))}
REPEATED = {f"repeated-{number}": "\n".join([page(f"repeated {number}", 30)] * 8) for number in range(2)}
COPIES = {f"copy-{number}": GOOD[f"good-{number}"] for number in (1, 2, 2, 9)} | {"copy-2b": GOOD["good-2"]}
NEAR = {f"near-{number}": near(GOOD[f"good-{number}"]) for number in (4, 5, 15)}
PLANTED = {**GOOD, **SHORT, **SYMBOLS, **REPEATED, **COPIES, **NEAR}


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted documents in three files of three formats, and four records that cannot be read."""
    root = tmp_path_factory.mktemp("raw")
    names = sorted(PLANTED, key=lambda name: hashlib.sha256(name.encode()).digest())
    rows = [
        {"id": name, "text": PLANTED[name], "rank": f"../{name}", "year": 2000 + at} for at, name in enumerate(names)
    ]
    lines = [json.dumps(row) for row in rows]
    bad = ["{torn", '{"id": "x"}', '{"id": "y", "text": "  "}']
    (root / "a.jsonl").write_text("\n".join([*lines[:14], *bad]) + "\n")
    (root / "b.jsonl.zst").write_bytes(zstandard.compress("\n".join(lines[14:26]).encode()))
    table = pa.Table.from_pylist([*rows[26:], {"id": "z", "text": None, "rank": "", "year": 0}])
    pq.write_table(table, root / "c.parquet", row_group_size=5)
    return root


@pytest.fixture
def settings(raw: Path, corpus: Path, tmp_path: Path) -> dict[str, Any]:
    """A configuration with every kind of pass."""
    return make_settings(raw, corpus, tmp_path / "out")


def make_settings(raw: Path, corpus: Path, out: Path) -> dict[str, Any]:
    return {
        "input": {"paths": [str(raw)], "keep": {"rank": "text", "year": "integer"}},
        "steps": [
            {"kind": "gopher_quality"},
            {"kind": "gopher_repetition"},
            {"kind": "exact_dedup"},
            {"kind": "minhash_dedup"},
            {"kind": "tokens", "tokenizer": str(corpus / "tokenizer.json")},
            {"kind": "length"},
            {"kind": "compression"},
            {"kind": "rare_words", "frequent": 100},
        ],
        "out": str(out),
        "keep_removed": True,
        "executor": {"kind": "local", "workers": 1},
    }


@pytest.fixture(scope="session")
def prepared(raw: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the whole configuration, made once."""
    from data_scheduler.prep.run import prepare

    out = tmp_path_factory.mktemp("prepared") / "out"
    prepare(PrepConfig.model_validate(make_settings(raw, corpus, out)))
    return out


def run(settings: dict[str, Any]) -> dict[str, Any]:
    from data_scheduler.prep.run import prepare

    report = prepare(PrepConfig.model_validate(settings)).report
    assert report is not None
    return report


def output(out: Path) -> dict[str, dict[str, Any]]:
    """Rows of the output by id."""
    rows = [row for path in sorted((out / "data").glob("*")) for row in rows_of(path)]
    return {row["id"]: row for row in rows}


def rows_of(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [
        json.loads(line) for line in zstandard.ZstdDecompressor().stream_reader(path.open("rb")).read().splitlines()
    ]


def removed(out: Path, step: str) -> set[str]:
    return {row["id"] for path in (out / "removed" / step).glob("*") for row in rows_of(path)}


def contents(out: Path) -> dict[str, bytes]:
    """Everything a preparation gives, but what it needs for resuming."""
    paths = [path for path in out.rglob("*") if path.is_file() and "work" not in path.relative_to(out).parts]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths if path.name != "prep.json"}


def small(tmp_path: Path, documents: dict[str, str], steps: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """Settings for a corpus of one file, to jsonl."""
    (tmp_path / "in").mkdir(exist_ok=True)
    lines = "".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in documents.items())
    (tmp_path / "in" / "0.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return {
        "input": {"paths": [str(tmp_path / "in")]},
        "steps": steps,
        "out": str(tmp_path / "out"),
        "output_format": "jsonl",
        "keep_removed": True,
        "executor": {"kind": "local", "workers": 1},
        **more,
    }
