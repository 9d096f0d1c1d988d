"""`headrace metrics export`."""

import json
import math
from pathlib import Path

import pyarrow.csv
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from headrace.errors import ConfigError
from pretrain.cli import app
from pretrain.metrics import export as module
from pretrain.metrics.export import export
from pretrain.metrics.jsonl import encode

RECORDS = [
    {"step": 0, "val_loss": {"code": 9.0}},
    {"step": 0, "loss": 9.5, "tokens": 2**53 + 1, "source_loss": {"code": 9.5}, "batch_sha256": "ab", "own": 1}
    | {"peak_memory_bytes": 7, "rank_data_wait_s": {"0": 0.5}},
    {"step": 1, "loss": math.nan, "tokens": 3, "source_loss": {'a, "b"\n': math.inf}, "own": 0.5},
]
COLUMNS = {
    "step": [0, 0, 1],
    "kind": ["val", "train", "train"],
    "val/loss/code": [9.0, None, None],
    "train/loss": [None, 9.5, math.nan],
    "train/tokens": [None, 2**53 + 1, 3],  # no float could hold it
    "train/source_loss/code": [None, 9.5, None],
    "train/batch_sha256": [None, "ab", None],
    "train/own": [None, 1.0, 0.5],
    "train/peak_memory_bytes": [None, 7, None],
    "train/rank_data_wait_s/0": [None, 0.5, None],
    'train/source_loss/a, "b"\n': [None, None, math.inf],
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(map(encode, RECORDS)) + b'{"step": 2, "lo')
    return tmp_path


@pytest.mark.parametrize("rows", [1, 2, 10])
def test_parquet_holds_every_value(run: Path, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", rows)
    assert export(run, run / "out" / "m.parquet", "parquet") == 3
    table = pyarrow.parquet.read_table(run / "out" / "m.parquet").to_pydict()
    assert repr(table) == repr(COLUMNS)  # by repr: NaN is not itself
    assert [path.name for path in (run / "out").iterdir()] == ["m.parquet"]


def test_csv_reads_back(run: Path) -> None:
    done = CliRunner().invoke(app, ["metrics", "export", str(run), "--format", "csv"])
    assert done.exit_code == 0
    assert done.output.startswith("3 records in ")
    options = pyarrow.csv.ParseOptions(newlines_in_values=True)
    nulls = pyarrow.csv.ConvertOptions(null_values=[""])
    table = pyarrow.csv.read_csv(run / "metrics.csv", parse_options=options, convert_options=nulls).to_pydict()
    assert table.keys() == COLUMNS.keys()
    for name in ("train/tokens", "train/loss", "train/own", "kind"):
        assert repr(table[name]) == repr(COLUMNS[name])


def test_what_is_no_run_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no metrics\.jsonl"):
        export(tmp_path, tmp_path / "x", "csv")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"torn": 1}) + "\n")
    with pytest.raises(ConfigError, match="no record yet"):
        export(tmp_path, tmp_path / "x", "csv")
