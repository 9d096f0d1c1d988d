"""open_sinks: what is opened, what a broken tracker costs, and the files trackers really leave."""

import builtins
import json
import logging
import os
from pathlib import Path

import pytest
from wandb_file import read_wandb_file

from headrace.errors import ConfigError
from pretrain.config import MetricsConfig, PrometheusConfig, WandbConfig
from pretrain.metrics import METRICS, open_sinks, read_records
from pretrain.metrics.registry import scalars
from pretrain.metrics.sink import Guarded, closing

TRAIN = {"step": 0, "tokens": 64, "loss": 5.5, "batch_sha256": "0" * 64, "source_loss": {"code": 5.5}}
EVAL = {"step": 1, "val_loss": {"code": 5.25}}


def test_the_names_fixed_by_the_interface_are_in_the_list() -> None:
    training = {"step", "tokens", "loss", "grad_norm", "lr", "tokens_per_s", "data_wait_s", "batch_sha256"}
    assert training | {"source_loss", "source_tokens", "val_loss"} <= {metric.name for metric in METRICS}
    exported = [metric.exported for metric in METRICS if metric.exported]
    assert len(set(exported)) == len(exported)


def test_scalars_name_every_number_once() -> None:
    assert dict(scalars({**TRAIN, "my_probe": 2})) == {
        "train/tokens": 64.0,
        "train/loss": 5.5,
        "train/source_loss/code": 5.5,
        "train/my_probe": 2.0,
    }
    assert dict(scalars(EVAL)) == {"val/loss/code": 5.25}


def test_metrics_jsonl_is_always_written(tmp_path: Path) -> None:
    (sink,) = open_sinks(MetricsConfig(), tmp_path / "run", "")
    sink.write(TRAIN)
    sink.close()
    sink.close()
    assert list(read_records(tmp_path / "run" / "metrics.jsonl")) == [TRAIN]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


class Broken:
    def write(self, record: dict) -> None:
        raise ConnectionError("network is gone")

    def close(self) -> None:
        raise ConnectionError("still gone")


def test_a_tracker_that_fails_costs_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    sink = Guarded(Broken(), "wandb")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            sink.write(TRAIN)
        sink.close()
    assert [record.message for record in caplog.records] == [
        "metrics.wandb failed and gets no more records; metrics.jsonl has them all: network is gone"
    ]


SWITCHES = {
    "wandb": (MetricsConfig(wandb=WandbConfig(enabled=True)), r"headrace\[trackers\]"),
    "torch.utils.tensorboard": (MetricsConfig(tensorboard=True), r"headrace\[trackers\]"),
    "prometheus_client": (MetricsConfig(prometheus=PrometheusConfig(enabled=True, port=0)), r"headrace\[train\]"),
}


@pytest.mark.parametrize("package", SWITCHES)
def test_a_missing_package_names_the_extra(package: str, tmp_path: Path, monkeypatch, caplog) -> None:
    """In a new run an error that keeps the old records; in a resumed one, where nobody watches, a warning."""
    (tmp_path / "metrics.jsonl").write_text(json.dumps(TRAIN) + "\n")
    real = builtins.__import__

    def without(name: str, *args, **kwargs):
        if name == package or name.startswith(package + "."):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    config, extra = SWITCHES[package]
    with pytest.raises(ConfigError, match=extra):
        open_sinks(config, tmp_path, "")
    assert list(read_records(tmp_path / "metrics.jsonl")) == [TRAIN]
    with caplog.at_level(logging.WARNING):
        (jsonl,) = open_sinks(config, tmp_path, "", resume_step=1)
    jsonl.close()
    assert "is left out" in caplog.text


def test_tensorboard_files_hold_each_step_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = MetricsConfig(tensorboard=True)
    for first, last in ((0, 6), (4, 8)):  # killed after step 5, resumed at 4
        sinks = open_sinks(config, tmp_path, "", resume_step=first)
        for step in range(first, last):
            for sink in sinks:
                sink.write({**TRAIN, "step": step, "loss": 10.0 * (first == 4) + step})
                if step % 2 and step + 1 != first:
                    sink.write({"step": step + 1, "val_loss": {"code": float(step + 1)}})
        for sink in sinks:
            sink.close()
    train = EventAccumulator(str(tmp_path / "log" / "tensorboard" / "train")).Reload()
    assert [(e.step, e.value) for e in train.Scalars("train/loss")] == [
        (0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0), (4, 14.0), (5, 15.0), (6, 16.0), (7, 17.0),
    ]  # fmt: skip
    assert "train/source_loss/code" in train.Tags()["scalars"]
    val = EventAccumulator(str(tmp_path / "log" / "tensorboard" / "val")).Reload()
    assert [(e.step, e.value) for e in val.Scalars("val/loss/code")] == [(s, float(s)) for s in (2, 4, 6, 8)]


def test_wandb_offline_writes_a_run_that_resumes_under_one_id(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("train: {steps: 7}\nmetrics: {prometheus: {token: s3cret}}\n")
    config = MetricsConfig(wandb=WandbConfig(enabled=True, project="mill"))
    for first in (0, 2):
        sinks = open_sinks(config, run_dir, "demo", resume_step=first)
        for sink in sinks:
            sink.write({**TRAIN, "step": first})
            sink.write({**EVAL, "step": first + 1})
            sink.close()
    files = sorted((run_dir / "log" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    (run_a, history_a), (run_b, history_b) = map(read_wandb_file, files)
    assert run_a["id"] == run_b["id"]
    assert (run_a["project"], run_a["name"]) == ("mill", "demo")
    assert run_a["config"]["train"] == {"steps": 7}
    assert all(
        b"s3cret" not in path.read_bytes() for path in run_dir.rglob("*") if path.is_file() and path.suffix == ".wandb"
    )
    steps = [
        {(h["step"], h.get("train/loss"), h.get("val/loss/code")) for h in hist} for hist in (history_a, history_b)
    ]
    assert steps == [{(0, 5.5, None), (1, None, 5.25)}, {(2, 5.5, None), (3, None, 5.25)}]
    assert {path.name for path in tmp_path.iterdir()} <= {"run", "home"}  # nothing outside the run folder


def test_wandb_online_without_a_key_is_refused(tmp_path: Path, monkeypatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setattr(type(wandb.api), "api_key", None)
    with pytest.raises(ConfigError, match="wandb login"):
        open_sinks(MetricsConfig(wandb=WandbConfig(enabled=True, mode="online")), tmp_path, "")


def test_sinks_are_closed_when_a_run_fails_too() -> None:
    class Held:
        closed = 0

        def write(self, record: dict) -> None: ...

        def close(self) -> None:
            self.closed += 1

    sinks = [Held(), Held()]
    with pytest.raises(KeyboardInterrupt), closing(sinks):
        raise KeyboardInterrupt
    assert [sink.closed for sink in sinks] == [1, 1]
