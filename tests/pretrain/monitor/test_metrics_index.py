"""The columns follow the file: while it grows, when it is torn, cut, replaced, and hostile."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.metrics.jsonl import JsonlSink
from pretrain.monitor import index_cache, metrics_index, views
from pretrain.monitor.metrics_index import Column, MetricsIndex
from pretrain.monitor.run_folder import RunFolder


def record(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "tokens": 10 * (step + 1), "loss": 5.0 - step, "source_loss": {"code": 1.0 + step}} | more


def losses(index: MetricsIndex) -> list[float]:
    index.update()
    found = index.tables["train"].series("loss")
    return [] if found is None else found.values.tolist()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_it_follows_a_file_that_grows(path: Path) -> None:
    index = MetricsIndex(path)
    assert losses(index) == []
    sink = JsonlSink.open(path)
    for step in range(3):
        sink.write(record(step))
        assert losses(index) == [5.0 - one for one in range(step + 1)]
    sink.write({"step": 3, "val_loss": {"code": 2.5}})
    index.update()
    assert index.tables["val"].series("val_loss/code").values.tolist() == [2.5]
    assert index.generation == 1


def test_half_a_line_waits_for_its_other_half(path: Path) -> None:
    line = json.dumps(record(0)).encode() + b"\n"
    index = MetricsIndex(path)
    for cut in range(0, len(line), 7):
        path.write_bytes(line[:cut])
        assert losses(index) == []
    path.write_bytes(line)
    assert losses(index) == [5.0]


def test_a_resumed_run_shows_no_step_twice(path: Path) -> None:
    index = MetricsIndex(path)
    sink = JsonlSink.open(path)
    for step in range(6):
        sink.write(record(step))
    sink.close()
    assert len(losses(index)) == 6
    sink = JsonlSink.open(path, resume_step=4)  # replaces the file
    sink.write(record(4, loss=0.25))
    assert losses(index) == [5.0, 4.0, 3.0, 2.0, 0.25]


def test_a_file_that_is_begun_anew_under_the_same_inode_is_read_anew(path: Path) -> None:
    index = MetricsIndex(path)
    path.write_text("".join(json.dumps(record(step)) + "\n" for step in range(3)))
    assert losses(index) == [5.0, 4.0, 3.0]
    inode = path.stat().st_ino
    path.write_text("".join(json.dumps(record(step, loss=7.0)) + "\n" for step in range(5)))
    assert path.stat().st_ino == inode
    assert losses(index) == [7.0] * 5
    assert index.generation == 2


def test_readers_see_whole_records_only_while_others_are_put_in(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder("run", path.parent)
    with path.open("w") as file:
        for step in range(5):
            file.write(json.dumps(record(step, source_tokens={"code": 10})) + "\n")
    run.update()
    names = set(run.metrics.tables["train"].shown.values)
    extend, seen = Column.extend, []

    def looking(self: Column, values: list[Any]) -> None:
        extend(self, values)
        mixture = views.mixture(run, 10)
        found = views.series(run, ["loss", "source_loss/code"], "tokens", 0, 1e9, 100, 1)["series"]
        heat = views.heat_map(run, "source_loss", ["code"], "step", 10)
        detail = views.detail(run)
        seen.append((mixture["tokens"]["code"], len(found["loss"]["x"]), len(heat["x"]), set(detail["series"])))

    monkeypatch.setattr(Column, "extend", looking)
    with path.open("a") as file:
        for step in range(5, 3000):  # the arrays grow
            file.write(json.dumps(record(step, source_tokens={"code": 10}, **{f"new{step % 7}": 1.0})) + "\n")
    run.metrics.update()
    assert len(seen) > 7
    every = names | {f"new{number}" for number in range(7)}
    whole = [(50.0, 5, 6, names), (30_000.0, 200, 11, every)]  # before the block, and after it
    assert all(found in whole for found in seen)
    assert [found == whole[0] for found in seen[:7]] == [True] * 7
    assert seen[-1] == whole[1]


def test_what_is_not_a_number_is_kept_as_such_and_nonsense_is_passed_over(path: Path) -> None:
    lines = [
        '{"step": 0, "loss": "NaN"}',
        "not json",
        '{"step": "1", "loss": 3}',
        "[1]",
        '{"step": 1, "loss": "Infinity", "text": "<script>", "deep": {"a": {"b": 1}}, "list": [1]}',
        '{"step": 2, "loss": 1e300}',
        '{"step": ' + "9" * 400 + "}",
    ]
    path.write_text("\n".join(lines) + "\n")
    index = MetricsIndex(path)
    found = losses(index)
    assert np.isnan(found[0])
    assert found[1:] == [np.inf, np.inf]
    assert set(index.tables["train"].values) == {"step", "loss"}


def test_names_without_end_do_not_fill_the_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_index, "MOST_SERIES", 50)
    with path.open("w") as file:
        for step in range(100):
            file.write(json.dumps({"step": step, f"name-{step}": 1.0, "x" * 1000 + str(step): 2.0}) + "\n")
    index = MetricsIndex(path)
    index.update()
    names = index.tables["train"].values
    assert len(names) <= 50
    assert max(map(len, names)) <= metrics_index.LONGEST_NAME


def test_a_line_longer_than_any_record_does_not_stop_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_index, "BLOCK", 1000)
    path.write_bytes(b'{"step": 0, "x": "' + b"y" * 5000 + b'"}\n' + json.dumps(record(1)).encode() + b"\n")
    index = MetricsIndex(path)
    assert losses(index) == [4.0]
    assert index.is_complete


def test_columns_are_kept_and_used_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_cache, "WORTH_KEEPING", 0)
    path.write_text("".join(json.dumps(record(step)) + "\n" for step in range(50)))
    first = MetricsIndex(path)
    first.update()
    index_cache.keep(first)
    with path.open("a") as file:
        file.write(json.dumps(record(50)) + "\n")
    again = MetricsIndex(path)
    assert index_cache.restore(again)
    assert len(again.tables["train"].step.view()) == 50
    assert losses(again) == [5.0 - step for step in range(51)]
    assert again.tables["train"].series("source_loss/code").values[-1] == 51.0


@pytest.mark.parametrize("damage", ["other file", "nonsense"])
def test_columns_of_another_file_are_not_used(path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.setattr(index_cache, "WORTH_KEEPING", 0)
    path.write_text("".join(json.dumps(record(step)) + "\n" for step in range(50)))
    first = MetricsIndex(path)
    first.update()
    index_cache.keep(first)
    if damage == "other file":
        path.write_text("".join(json.dumps(record(step, loss=7.0)) + "\n" for step in range(60)))
    else:
        next(index_cache.cache_folder().glob("*.npz")).write_bytes(b"PK\x03\x04 no archive")
    again = MetricsIndex(path)
    index_cache.restore(again)
    assert losses(again) == ([7.0] * 60 if damage == "other file" else [5.0 - step for step in range(50)])
