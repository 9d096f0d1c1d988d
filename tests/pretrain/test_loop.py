"""Whole runs: killed, resumed, spread over processes, stopped by signals; loss curve and token stream never differ."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import child_process
import pytest
from process_group import run_ranks
from small_run import STEPS, Make, curve, go, maker, run_to_end

from data_scheduler import DataConfig, Journal, batch_sha256
from data_scheduler.replay import replay
from headrace.errors import CheckpointError, ConfigError, LayoutError
from pretrain import checkpoint
from pretrain.config import RunConfig
from pretrain.metrics import read_records
from pretrain.recovery import fault_points
from pretrain.train import train


@pytest.fixture
def run_config(data_config: Callable[..., DataConfig], tmp_path: Path) -> Make:
    return maker(data_config, tmp_path)


@pytest.fixture(scope="module")
def uninterrupted(
    data_config: Callable[..., DataConfig], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    config = maker(data_config, tmp_path_factory.mktemp("whole"))("uninterrupted")
    run_to_end(config)
    return curve(config)


def test_records_have_what_was_promised(run_config: Make) -> None:
    config = run_config("run")
    run_to_end(config)
    run_dir = Path(config.run.dir)
    records = list(read_records(run_dir / "metrics.jsonl"))
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == list(range(STEPS))
    promised = {"step", "tokens", "loss", "grad_norm", "lr", "tokens_per_s", "data_wait_s", "batch_sha256"}
    assert all(promised | {"source_loss", "source_tokens"} <= set(record) for record in steps)
    assert [record["step"] for record in records if "val_loss" in record] == [0, STEPS]
    assert all(set(record["val_loss"]) == set("abcd") for record in records if "val_loss" in record)
    for record in steps:
        mean = sum(record["source_loss"][name] * count for name, count in record["source_tokens"].items())
        assert record["loss"] == pytest.approx(mean / sum(record["source_tokens"].values()), rel=1e-12)
    assert steps[-1]["loss"] < steps[0]["loss"]
    kinds = [event.kind for event in Journal(run_dir / "journal.jsonl", writable=False).events]
    assert kinds[0] == "run_started"
    assert kinds[-1] == "run_finished"
    assert kinds.count("checkpoint") == 3
    present = {path.name for path in run_dir.iterdir()}
    assert present == {"config.yaml", "journal.jsonl", "metrics.jsonl", "checkpoints", "control", "data_state", "log"}


def test_replay_equals_what_training_recorded(run_config: Make) -> None:
    config = run_config("run")
    run_to_end(config)
    recorded = {record["step"]: record["batch_sha256"] for record in curve(config) if "batch_sha256" in record}
    again = {batch.step: batch_sha256(batch.digests) for batch in replay(config.run.dir, 0, STEPS - 1)}
    assert again == recorded


@pytest.mark.parametrize("seed", range(3))
def test_kill_9_at_a_random_moment_changes_nothing(
    run_config: Make, uninterrupted: list[dict[str, Any]], seed: int
) -> None:
    config = run_config(f"killed-{seed}")
    log = Path(config.run.dir).with_suffix(".log")
    rng = random.Random(seed)
    metrics = Path(config.run.dir) / "metrics.jsonl"
    for _ in range(6):
        pid = child_process.start(lambda: train(config), log)
        target = (len(metrics.read_bytes().splitlines()) if metrics.exists() else 0) + rng.randint(1, 6)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and os.waitpid(pid, os.WNOHANG) == (0, 0):
            if metrics.exists() and len(metrics.read_bytes().splitlines()) >= target:
                time.sleep(rng.random() * 0.05)
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                break
        else:
            break  # it finished
    run_to_end(config)
    assert curve(config) == uninterrupted, log.read_text()


@pytest.mark.parametrize("behind", [True, False], ids=["behind", "at once"])
@pytest.mark.parametrize("point", [point for point in fault_points.POINTS if point.startswith("checkpoint")])
def test_a_kill_in_the_middle_of_a_save_never_loses_the_one_before(
    run_config: Make, uninterrupted: list[dict[str, Any]], point: str, behind: bool
) -> None:
    config = run_config("run", checkpoint__behind=behind)

    def die() -> int:
        fault_points.ask(f"{point}=kill,hit2")
        return train(config)

    log = Path(config.run.dir).with_suffix(".log")
    assert child_process.run(die, log) == -signal.SIGKILL, log.read_text()
    steps = checkpoint.Checkpoints(config.run.dir).steps()
    assert steps in ([4], [4, 8])
    named = ("checkpoint: has its name", "checkpoint: older removed", "checkpoint: journaled")
    assert (8 in steps) == (point in named)
    run_to_end(config)
    assert f"resuming {config.run.dir} at step {steps[-1]}" in log.read_text()
    assert curve(config) == uninterrupted
    assert not list(Path(config.run.dir).glob("checkpoints/*.partial"))


def test_a_signal_saves_and_leaves_with_the_code_for_restart(
    run_config: Make, uninterrupted: list[dict[str, Any]]
) -> None:
    for number in (signal.SIGUSR1, signal.SIGTERM):
        config = run_config(f"signalled-{number}", checkpoint__every=0)
        log = Path(config.run.dir).with_suffix(".log")
        pid = child_process.start(lambda config=config: train(config), log)
        metrics = Path(config.run.dir) / "metrics.jsonl"
        while not (metrics.exists() and len(metrics.read_bytes().splitlines()) >= 4):
            time.sleep(0.002)
        os.kill(pid, number)
        assert child_process.wait(pid) == 4, log.read_text()
        assert "asked to stop: saved at step" in log.read_text()
        run_to_end(config)
        assert curve(config) == uninterrupted


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (2, {}),
        (2, {"tensor_parallel_size": 2, "sequence_parallel": True}),
        (2, {"pipeline_parallel_size": 2}),
        (4, {"tensor_parallel_size": 2, "distributed_optimizer": True}),
        (2, {"fully_sharded": True}),
    ],
)
def test_resuming_on_another_layout_continues_the_same_run(
    run_config: Make, uninterrupted: list[dict[str, Any]], world_size: int, parallel: dict[str, Any]
) -> None:
    """Half on one process, half on several: the same tokens, the same losses to 1e-5."""
    name = f"run-{world_size}-{'-'.join(parallel)}"
    changes = {f"parallel__{key}": value for key, value in parallel.items()}
    half = run_config(name, train__steps=STEPS, checkpoint__every=6)

    def first_half() -> int:
        fault_points.ask("checkpoint: journaled=kill")
        return train(half)

    assert child_process.run(first_half, Path(half.run.dir).with_suffix(".log")) == -signal.SIGKILL
    config = run_config(name, **changes)
    assert run_ranks(world_size, go, config) == [0] * world_size
    for record, expected in zip(curve(config), uninterrupted, strict=True):
        assert record["step"] == expected["step"]
        if "val_loss" in record:
            assert record["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-5)
        else:
            assert record["batch_sha256"] == expected["batch_sha256"]
            assert record["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


def expect_one_line(config: RunConfig, error: type[Exception], message: str) -> None:
    log = Path(config.run.dir).with_suffix(".bad.log")
    log.unlink(missing_ok=True)
    code = child_process.run(lambda: train(config), log)
    text = log.read_text()
    assert code == int(error.exit_code), text  # type: ignore[attr-defined]
    lines = [line for line in text.splitlines() if line.startswith("headrace: error:")]
    assert len(lines) == 1, text
    assert message in lines[0]
    assert "Traceback" not in text


def test_mistakes_are_one_line(run_config: Make, tmp_path: Path) -> None:
    good = run_config("run")
    run_to_end(good)
    other = run_config("run", model__hidden_size=64, train__steps=20)
    expect_one_line(other, CheckpointError, "hidden_size is 32 there and 64")
    longer = run_config("none", data__sources=[{"name": "x", "paths": [str(tmp_path / "missing.jsonl")]}])
    expect_one_line(longer, ConfigError, "no file at")
    odd = run_config("odd", parallel__tensor_parallel_size=3)
    expect_one_line(odd, LayoutError, "tensor_parallel_size 3")
    small = run_config("small", model__vocab_size=128)
    expect_one_line(small, ConfigError, "model.vocab_size is 128 but the tokenizer has")
    no_tokenizer = run_config("no-tokenizer", data__tokenizer=str(tmp_path / "nowhere"))
    expect_one_line(no_tokenizer, ConfigError, "nowhere")


def test_a_damaged_checkpoint_is_named(run_config: Make) -> None:
    config = run_config("run")
    run_to_end(config)
    latest = checkpoint.Checkpoints(config.run.dir).latest()
    assert latest is not None
    longer = run_config("run", train__steps=20, checkpoint__verify=False)
    journal = Path(config.run.dir) / "journal.jsonl"
    events = journal.read_bytes()
    journal.unlink()
    expect_one_line(longer, CheckpointError, "has checkpoints but no journal.jsonl; restore the file")
    assert not journal.exists()
    journal.write_bytes(events)
    rng = latest / "rng" / "rank-00000.pt"
    rng.write_bytes(b"\x80rubbish")
    expect_one_line(longer, CheckpointError, f"{rng}: cannot be loaded")
    for shard in latest.glob("*.distcp"):
        shard.write_bytes(shard.read_bytes()[:100])
    expect_one_line(longer, CheckpointError, "if its files are damaged, move the folder of this step away")


def test_a_finished_run_says_so_and_a_longer_one_goes_on(run_config: Make) -> None:
    config = run_config("run", train__steps=4)
    run_to_end(config)
    before = curve(config)
    run_to_end(config)
    assert curve(config) == before
    assert "is done. Raise it to go on" in Path(config.run.dir).with_suffix(".log").read_text()
    longer = run_config("run", train__steps=6, optimizer__schedule="constant")
    run_to_end(longer)
    assert [record["step"] for record in curve(longer) if "loss" in record] == list(range(6))


def test_only_the_newest_checkpoints_are_kept(run_config: Make) -> None:
    config = run_config("run", checkpoint__every=2, checkpoint__keep_last=2)
    run_to_end(config)
    assert checkpoint.Checkpoints(config.run.dir).steps() == [10, 12]
    states = sorted(path.name for path in Path(config.run.dir).glob("data_state/*"))
    assert states == [f"step-{step:08d}.npz" for step in range(2, 13, 2)]
