"""What stands between steps, to the byte, for every optimizer and what is spread over ranks."""

from typing import Any

import pytest
import torch
from process_group import run_ranks
from test_memory import config_of, estimated, measured, storages
from tiny_run import tiny_batch, tiny_state

from parallel import process_groups
from parallel.layout import Layout
from pretrain.config import RunConfig
from pretrain.step import train_step

KINDS: dict[str, dict[str, Any]] = {
    "sgd": {"kind": "sgd"},
    "sgd without momentum": {"kind": "sgd", "momentum": 0.0},
    "muon": {"kind": "muon"},
    "muon bf16": {"kind": "muon", "precision": "bf16"},
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "moe_ffn_hidden_size": 48, "moe_shared_ffn_hidden_size": 32}


def standing_bytes(config: RunConfig, layout: Layout) -> dict[str, int]:
    """Bytes of this rank's buffers after a step."""
    state = tiny_state(config, layout)
    waiting: list[int] = []
    if layout.fully_sharded:
        _watch(state.wrapped[0], waiting)
    ranks, size = state.ranks, config.train.micro_batch_size
    train_step(state, tiny_batch(0, ranks.dp_rank, ranks.dp_size, size), 1e-3)
    weights = storages(p for chunk in state.stored for _, p in chunk.named_parameters())
    if layout.fully_sharded:
        gradients = storages(p.main_grad for chunk in state.stored for _, p in chunk.named_parameters())
    else:
        buffers = (b for chunk in state.wrapped for b in (*chunk.buffers, *chunk.expert_parallel_buffers))
        gradients = storages(buffer.grad_data for buffer in buffers)
    optimizer: dict[int, int] = {}
    for part in state.optimizer.chained_optimizers:
        optimizer |= storages(parameter for group in part.optimizer.param_groups for parameter in group["params"])
        kept = (value for of_one in part.optimizer.state.values() for value in of_one.values())
        optimizer |= storages(value for value in kept if torch.is_tensor(value))
    optimizer = {address: size for address, size in optimizer.items() if address not in weights}
    if layout.world_size == 1:
        process_groups.shutdown()
    return {
        "weights": sum(weights.values()),
        "gradients": sum(gradients.values()) + max(waiting, default=0),
        "optimizer": sum(optimizer.values()),
    }


def _watch(chunk: Any, waiting: list[int]) -> None:
    """Note the bytes of whole gradients each time that they are about to be reduced."""
    original = chunk.module.set_requires_gradient_sync

    def watched(sync: bool) -> None:
        if sync:
            groups = [part._get_fsdp_state()._fsdp_param_group for part in chunk._parts()]
            whole = [p.unsharded_accumulated_grad for group in groups if group for p in group.fsdp_params]
            whole += [
                p._unsharded_param.grad for g in groups if g for p in g.fsdp_params if hasattr(p, "_unsharded_param")
            ]
            waiting.append(sum(each.numel() * each.itemsize for each in whole if each is not None))
        original(sync)

    chunk.module.set_requires_gradient_sync = watched


@pytest.mark.parametrize("name", KINDS)
def test_optimizers(name: str) -> None:
    config = config_of("qwen3", **KINDS[name])
    [stage] = estimated(config, Layout(1))
    assert standing_bytes(config, Layout(1)) == {
        key: getattr(stage, key) for key in ("weights", "gradients", "optimizer")
    }


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", KINDS)
def test_owners_keep_the_state_of_whole_parameters(name: str) -> None:
    config, layout = config_of("llama", **KINDS[name]), Layout(2, distributed_optimizer=True)
    found = run_ranks(2, standing_bytes, config, layout, timeout_s=120)
    [stage] = estimated(config, layout)
    assert [rank["weights"] for rank in found] == [stage.weights] * 2
    assert [rank["gradients"] for rank in found] == [stage.gradients] * 2
    assert max(rank["optimizer"] for rank in found) == stage.optimizer


@pytest.mark.multiprocess
@pytest.mark.parametrize("reduce", ["step", "micro_batch"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fully_sharded(precision: str, reduce: Any) -> None:
    # A weight of 130 rows, of which neither rank has half a row.
    config = config_of("llama", precision=precision, micro_batch_size=1, ffn_hidden_size=130)
    layout = Layout(2, fully_sharded=True, reduce_gradients=reduce)
    found = run_ranks(2, standing_bytes, config, layout, timeout_s=120)
    [stage] = estimated(config, layout)
    assert found == [{key: getattr(stage, key) for key in ("weights", "gradients", "optimizer")}] * 2


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "layout",
    [Layout(1), Layout(2, expert_parallel_size=2), Layout(2, distributed_optimizer=True, expert_parallel_size=2)],
    ids=["one process", "ep2", "ep2 distributed optimizer"],
)
def test_experts(layout: Layout) -> None:
    config = config_of("llama", micro_batch_size=1, **EXPERTS)
    found = run_ranks(layout.world_size, standing_bytes, config, layout, timeout_s=120)
    [stage] = estimated(config, layout)
    for rank in found:
        assert (rank["weights"], rank["gradients"]) == (stage.weights, stage.gradients)
    # A rank whose shard holds padding has that much less.
    most = max(rank["optimizer"] for rank in found)
    assert most <= stage.optimizer <= most + 8 * 4 * 128


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_multi_token_heads(precision: str) -> None:
    config = config_of("llama", precision=precision, mtp={"depth": 2})
    [stage] = estimated(config, Layout(1))
    found = measured(config, Layout(1))
    assert {key: found[key] for key in ("weights", "gradients", "optimizer")} == {
        key: getattr(stage, key) for key in ("weights", "gradients", "optimizer")
    }
    assert found["activations"] == pytest.approx(stage.activations + stage.logits, rel=0.1)
