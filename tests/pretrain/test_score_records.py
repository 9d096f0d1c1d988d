"""Scores of tasks in `metrics.jsonl`: added beside a run that writes, kept by a resume, shown by the report."""

import json
from pathlib import Path

import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from pretrain.cli import app
from pretrain.metrics import read_records
from pretrain.metrics.export import export
from pretrain.metrics.jsonl import JsonlSink, append_record
from pretrain.monitor.metrics_index import MetricsIndex
from pretrain.report import load_run, summarise
from pretrain.report_html import page


def training(step: int) -> dict[str, object]:
    each: dict[str, object] = {"source_loss": {"code": 5.0}, "source_tokens": {"code": 8}}
    return {"step": step, "tokens": 8 * step + 8, "loss": 5.0, "tokens_per_s": 8.0, "data_wait_s": 0.0, **each}


def scored(step: int, value: float) -> dict[str, object]:
    return {"step": step, "eval": {"piqa/acc": value}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    sink = JsonlSink.open(path)
    for step in range(4):
        sink.write(training(step))
        if step == 3:
            append_record(path, scored(2, 0.5))  # the run writes on
        sink.write({"step": step + 1, "val_loss": {"code": 4.0}, "val_bits_per_byte": {"code": 1.5}})
    sink.close()
    append_record(path, scored(4, 0.75))
    return path.parent


def test_a_resume_keeps_the_scores_of_checkpoints_that_stay(run: Path) -> None:
    path = run / "metrics.jsonl"
    append_record(path, scored(3, 0.6))
    sink = JsonlSink.open(path, resume_step=3)
    sink.write({"step": 3, "val_loss": {"code": 9.0}})  # already there
    sink.close()
    records = list(read_records(path))
    assert [record["step"] for record in records if "eval" in record] == [2, 3]
    assert [record["step"] for record in records if "loss" in record] == [0, 1, 2]
    assert [record["val_loss"]["code"] for record in records if "val_loss" in record] == [4.0, 4.0, 4.0]
    # Scores alone do not stand for the evaluation of that step.
    sink = JsonlSink.open(path, resume_step=2)
    sink.close()
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "val_loss" not in line))
    sink = JsonlSink.open(path, resume_step=2)
    sink.write({"step": 2, "val_loss": {"code": 1.0}})
    sink.close()
    assert [record["step"] for record in read_records(path) if "val_loss" in record] == [2]


def test_a_start_from_converted_weights_keeps_their_scores(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    held_out = {"step": 0, "val_loss": {"code": 9.0}}
    for _ in range(2):  # killed before its first checkpoint, the run starts from the weights again
        append_record(path, scored(0, 0.5))
        sink = JsonlSink.open(path, from_checkpoint=True)
        sink.write(held_out)
        sink.write(training(0))
        sink.close()
    assert list(read_records(path)) == [scored(0, 0.5), scored(0, 0.5), held_out, training(0)]
    JsonlSink.open(path).close()  # new weights: nothing from before is theirs
    assert not list(read_records(path))


def test_half_a_line_of_a_killed_run_does_not_swallow_them(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_record(path, scored(1, 0.5))
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    append_record(path, scored(2, 0.6))
    assert [record["eval"]["piqa/acc"] for record in read_records(path)] == [0.5, 0.6]


def test_the_report_tables_and_dashboard_have_them(run: Path) -> None:
    data = load_run(run)
    summary = summarise(data)
    assert summary.steps == 4
    assert summary.scores == {"piqa/acc": {"2": 0.5, "4": 0.75}}
    assert summary.sources[0].last_val_bits_per_byte == 1.5
    shown = CliRunner().invoke(app, ["report", str(run)])
    assert shown.exit_code == 0, shown.output
    assert "piqa/acc" in shown.stdout
    assert "0.7500" in shown.stdout
    assert json.loads(summary.to_json())["scores"] == summary.scores
    assert "piqa/acc" in page(data)
    export(run, run / "table.parquet", "parquet")
    table = pyarrow.parquet.read_table(run / "table.parquet").to_pylist()
    assert [(row["kind"], row["eval/piqa/acc"]) for row in table if row["kind"] == "eval"] == [
        ("eval", 0.5),
        ("eval", 0.75),
    ]
    assert [row["val/bits_per_byte/code"] for row in table if row["kind"] == "val"] == 4 * [1.5]
    index = MetricsIndex(run / "metrics.jsonl")
    index.update()
    assert index.tables["train"].step.view().tolist() == [0, 1, 2, 3]
    assert index.tables["val"].series("eval/piqa/acc").values.tolist() == [0.5, 0.75]
