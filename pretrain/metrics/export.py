"""A run's records as a table for other programs: parquet or CSV.

    export("runs/wonton", Path("wonton.parquet"), "parquet")

One row a record, training steps and evaluations in the order of `metrics.jsonl`, told apart by column `kind` (`train`,
`val`, and `eval` for scores of tasks). Columns are named as in the trackers (`train/loss`, `train/source_loss/code`,
`val/loss/code`, `eval/piqa/acc`), besides `step` and `kind`; values per rank are there too. A value that a record does
not have is null (empty in CSV); NaN and infinities stay what they are. Whole numbers stay whole: int64, all others
float64.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from headrace.errors import ConfigError
from pretrain.metrics.jsonl import read_records
from pretrain.metrics.registry import METRICS, Record, has_scores, is_evaluation, tracker_name

ROWS = 10_000
"""Rows in a group: what is held in memory at once."""
WHOLE = frozenset(
    {"steps", "tokens", "sequences", "bytes", "documents", "records", "restarts", "anomalies", "rollbacks"}
)
"""Units of values that are whole numbers, unless they are estimates."""
_KINDS = {
    metric.name: pa.string()
    if metric.kind == "text"
    else pa.int64()
    if metric.unit in WHOLE and metric.made_by != "pretrain.dynamics"
    else pa.float64()
    for metric in METRICS
}


def export(run: Path, out: Path, form: Literal["parquet", "csv"]) -> int:
    """Write the records of the folder `run` into `out`; how many there are. Raises ConfigError when `run` has none."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise ConfigError(f"{run} is not a run folder: it has no metrics.jsonl")
    fields: dict[str, pa.DataType] = {"step": pa.int64(), "kind": pa.string()}
    count = 0
    for record in read_records(path):
        count += 1
        for name, kind, _ in _cells(record):
            # A policy's or an experiment's own value may be whole at first and not later.
            fields[name] = kind if fields.get(name, kind) == kind else pa.float64()
    if not count:
        raise ConfigError(f"{path} has no record yet")
    schema = pa.schema(list(fields.items()))
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    try:
        opened = pa.parquet.ParquetWriter if form == "parquet" else pa.csv.CSVWriter
        with opened(str(partial), schema) as writer:
            for table in _tables(path, schema, count):
                writer.write_table(table)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return count


def _tables(path: Path, schema: pa.Schema, count: int) -> Iterator[pa.Table]:
    """The records in groups; no more than `count`, should the run write on meanwhile."""
    rows: list[Record] = []
    for number, record in enumerate(read_records(path)):
        if number == count:
            break
        row: Record = {"step": record["step"], "kind": _kind(record)}
        for name, _, value in _cells(record):
            row[name] = float(value) if schema.field(name).type == pa.float64() else value
        rows.append(row)
        if len(rows) == ROWS:
            yield pa.Table.from_pylist(rows, schema)
            rows = []
    yield pa.Table.from_pylist(rows, schema)


def _kind(record: Record) -> str:
    return "val" if is_evaluation(record) else "eval" if has_scores(record) else "train"


def _cells(record: Record) -> Iterator[tuple[str, pa.DataType, object]]:
    """(column, type, value) of a record but its step."""
    for name, value in record.items():
        if name == "step":
            continue
        column = tracker_name(name)
        for suffix, cell in value.items() if isinstance(value, dict) else (("", value),):
            if isinstance(cell, int | float):  # true and false among them
                kind = _KINDS.get(name, pa.int64() if isinstance(cell, int) else pa.float64())
            elif isinstance(cell, str) and _KINDS.get(name, pa.string()) == pa.string():
                kind = pa.string()
            else:
                continue
            yield (f"{column}/{suffix}" if suffix else column), kind, cell
