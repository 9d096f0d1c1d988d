"""fp16: a loss scale that finds its size, is part of the checkpoint, and never lets an overflow reach the weights."""

from collections.abc import Callable
from pathlib import Path

import child_process
import pytest
import torch
from process_group import run_ranks
from resharding import go_on, load_then_go_on, save_then_go_on
from tiny_run import tiny_batch, tiny_config, tiny_state, tiny_steps

from data_scheduler import DataConfig
from headrace.errors import ConfigError
from parallel import process_groups
from parallel.layout import Layout
from pretrain.config import validate_config
from pretrain.metrics import read_records
from pretrain.step import train_step
from pretrain.train import train

OVERFLOWING = 2.0**24


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_an_overflow_halves_the_scale_and_leaves_the_weights_alone(kind: str) -> None:
    state = tiny_state(tiny_config(kind=kind, precision="fp16", initial_loss_scale=OVERFLOWING), Layout(1))
    before = {name: value.clone() for name, value in state.chunks[0].named_parameters()}
    masters = [p.main_param.clone() for p in state.chunks[0].parameters()]
    scale = OVERFLOWING
    for step in range(40):
        result = train_step(state, tiny_batch(step), 1e-3)
        assert result.loss_scale == scale
        if not result.skipped:
            break
        scale /= 2
        assert all(torch.equal(before[name], value) for name, value in state.chunks[0].named_parameters())
        assert all(torch.equal(a, p.main_param) for a, p in zip(masters, state.chunks[0].parameters(), strict=True))
    assert step > 0
    assert not result.skipped
    assert any(not torch.equal(before[name], value) for name, value in state.chunks[0].named_parameters())
    process_groups.shutdown()


def test_the_scale_doubles_after_a_window_without_overflow() -> None:
    config = tiny_config(precision="fp16", initial_loss_scale=16.0, loss_scale_window=2)
    assert [result.loss_scale for result in tiny_steps(config, Layout(1))] == [16.0, 16.0, 32.0, 32.0, 64.0]


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("adamw", Layout(2, distributed_optimizer=True)),
        ("adamw", Layout(2, tensor_parallel_size=2)),
        ("adamw", Layout(2, pipeline_parallel_size=2)),
        ("sgd", Layout(2, distributed_optimizer=True)),
    ],
    ids=["dp2 distributed optimizer", "tp2", "pp2", "sgd, dp2 distributed optimizer"],
)
def test_ranks_agree_on_the_scale_and_the_curve_is_near_fp32s(kind: str, layout: Layout) -> None:
    config = tiny_config(kind=kind, micro_batch_size=1, precision="fp16", initial_loss_scale=2.0**20)
    ranks = run_ranks(2, tiny_steps, config, layout, 16, timeout_s=120)
    assert [result.loss_scale for result in ranks[0]] == [result.loss_scale for result in ranks[1]]
    skipped = sum(result.skipped for result in ranks[0])
    assert 0 < skipped < 14
    assert ranks[0][-1].loss_scale == 2.0 ** (20 - skipped)

    def fp32() -> list[float]:
        """The steps that were not skipped, and the last."""
        other = tiny_config(kind=kind, micro_batch_size=1)
        state = tiny_state(other, Layout(1))
        losses = [result.loss for result in go_on(state, other, skipped, 16)]
        process_groups.shutdown()
        return losses

    if not any(result.skipped for result in ranks[0][skipped:]):
        half = [result.loss for result in ranks[0][skipped:]]
        assert half == pytest.approx(fp32(), rel=5e-3)


@pytest.mark.multiprocess
@pytest.mark.parametrize("layout", [Layout(1), Layout(2, distributed_optimizer=True)], ids=["1", "dp2 distributed"])
def test_resuming_keeps_the_scale(layout: Layout, tmp_path: Path) -> None:
    config = tiny_config(precision="fp16", initial_loss_scale=64.0, loss_scale_window=2)
    size = layout.world_size
    expected = run_ranks(size, save_then_go_on, config, layout, tmp_path / "a", 3, 3, timeout_s=120)[0]
    again = run_ranks(size, load_then_go_on, config, layout, tmp_path / "a", 3, 3, timeout_s=120)[0]
    assert [result.loss_scale for result in expected] == [128.0, 256.0, 256.0]
    assert [result.loss_scale for result in again] == [128.0, 256.0, 256.0]
    assert [result.loss for result in again] == [result.loss for result in expected]


def test_muon_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer.kind: muon does not go with train.precision: fp16"):
        tiny_config(kind="muon", precision="fp16")


def test_a_run_records_its_scale(data_config: Callable[..., DataConfig], tmp_path: Path) -> None:
    sizes = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "ffn_hidden_size": 16}
    raw = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"family": "llama", **sizes},
        "data": data_config(seq_len=16, global_batch_size=2, lanes=2).model_dump(),
        "train": {"steps": 2, "precision": "fp16", "initial_loss_scale": 8.0, "loss_scale_window": 1,
                  "eval_sequences": 0, "threads": 1},
        "metrics": {"progress": False},
    }  # fmt: skip
    assert child_process.run(lambda: train(validate_config(raw, "test")), tmp_path / "log") == 0
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [record["loss_scale"] for record in records] == [8.0, 16.0]
