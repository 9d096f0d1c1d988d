"""`headrace data index`: what a person is told before a run, and the copies made ahead of it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
import zstandard

from data_scheduler import DataConfig, Scheduler

ROOT = Path(__file__).parents[2]


def headrace(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "pretrain", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.fixture
def config(data_config: Callable[..., DataConfig], tmp_path: Path) -> Path:
    """Sources: `large` (two compressed files past what is held in memory), `rows` (parquet), `broken`, `few`."""
    for name in ("large", "rows", "broken", "few"):
        (tmp_path / name).mkdir()
    noise = b"".join(b'{"text": "%d %s"}\n' % (n, bytes(97 + (n * i) % 26 for i in range(40))) for n in range(20_000))
    for number in range(2):
        (tmp_path / "large" / f"{number}.jsonl.zst").write_bytes(zstandard.compress(noise) + bytes(9 << 20))  # padding
    pq.write_table(pa.table({"text": ["water"] * 500}), tmp_path / "rows" / "0.parquet", row_group_size=100)
    pq.write_table(pa.table({"text": ["water"] * 50}), tmp_path / "broken" / "0.parquet")
    (tmp_path / "broken" / "1.parquet").write_bytes(b"PAR1 and nothing else")
    pq.write_table(pa.table({"text": ["water"] * 3}), tmp_path / "few" / "0.parquet")
    raw: dict[str, Any] = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {
            "family": "llama", "num_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "ffn_hidden_size": 32,
        },
        "data": data_config(
            sources=[{"name": name, "paths": [str(tmp_path / name)]} for name in ("large", "rows", "broken", "few")],
            cache_dir=str(tmp_path / "cache"),
            chunk_bytes=4 << 20,
        ).model_dump(),
        "train": {"steps": 3},
    }  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_sources_are_described_and_copies_are_made_ahead(config: Path, tmp_path: Path) -> None:
    done = headrace("data", "index", config, "--copies", "--json", "data.lanes=12")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["lanes"] == 12
    large, rows, broken, few = found["sources"]
    size = sum(path.stat().st_size for path in (tmp_path / "large").iterdir())
    assert (large["files"], large["bytes"], large["text_bytes"]) == (2, size, 4 * size)
    assert large["chunks"] == sum(
        -(-4 * path.stat().st_size // large["chunk_bytes"]) for path in (tmp_path / "large").iterdir()
    )
    assert large["chunks_per_lane"] == pytest.approx(large["chunks"] / 12, abs=0.01)
    assert (large["documents"], large["large_units"], large["problems"]) == (None, 2, [])
    assert (rows["documents"], rows["large_units"]) == (500, 0)
    assert any("1.parquet: not readable" in problem for problem in broken["problems"])
    assert "3 documents for 12 lanes; give it more data or lower data.lanes" in few["problems"]
    copies = list((tmp_path / "cache" / "copies").glob("*.blocks"))
    assert len(copies) == 2
    before = {copy: copy.stat().st_ino for copy in copies}
    data = DataConfig.model_validate(yaml.safe_load(config.read_text())["data"] | {"lanes": 12})
    next(Scheduler(data))
    assert {copy: copy.stat().st_ino for copy in (tmp_path / "cache" / "copies").glob("*.blocks")} == before


def test_a_table_for_people_and_copies_that_do_not_fit(config: Path, tmp_path: Path) -> None:
    done = headrace("data", "index", config, "--copies", "data.cache_max_bytes=100000")
    assert done.returncode == 0, done.stderr
    assert "chunks per lane" in done.stdout
    assert "large: copies need about" in done.stdout
    assert done.stdout.count("no copy in") == 2
    assert not list((tmp_path / "cache" / "copies").glob("*.blocks"))


def test_bad_input_is_one_line(config: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ((tmp_path / "none.yaml",), "file not found"),
        ((config, "data.lanez=3"), "did you mean 'lanes'"),
        ((config, "data.sources.rows.paths=[/nowhere/at/all]"), "source 'rows': no file at /nowhere/at/all"),
    ):
        done = headrace("data", "index", *arguments)
        assert done.returncode == 2
        assert done.stdout == ""
        assert message in done.stderr.strip().splitlines()[-1]
        assert "Traceback" not in done.stderr
