"""Every parameter has one master weight, in fp32 and of its values, whatever the optimizer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from process_group import run_ranks
from tiny_run import BATCH, tiny_batch, tiny_config, tiny_state

from data_scheduler.state import State
from parallel import process_groups
from parallel.layout import Layout
from parallel.parameter_names import parameter_names
from pretrain import checkpoint
from pretrain.master_weights import master_weights
from pretrain.step import TrainState, train_step


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("changes", "sharded"),
    [
        ({}, False),
        ({}, True),
        ({"precision": "bf16"}, False),
        ({"precision": "bf16"}, True),
        ({"kind": "muon", "precision": "bf16"}, False),
        ({"kind": "sgd"}, False),
    ],
    ids=["fp32", "fp32 sharded", "bf16", "bf16 sharded", "muon", "sgd"],
)
def test_every_weight_of_the_model_has_one(changes: dict[str, Any], sharded: bool) -> None:
    def weights(layout: Layout) -> tuple[dict[str, int], dict[str, int]]:
        """(values of each parameter, values of its master weight on this rank)."""
        state = tiny_state(tiny_config(**changes), layout)
        names = parameter_names(state.stored)
        held = {names[parameter]: 0 for parameter, _ in master_weights(state.optimizer)}
        for parameter, master in master_weights(state.optimizer):
            assert master.dtype == torch.float32
            assert held[names[parameter]] == 0, "one each"
            held[names[parameter]] = master.numel()
            own = parameter.detach().float().view(-1)
            assert sharded or torch.equal(master.view(-1).to(parameter.dtype).float(), own)
            assert master.numel() == own.numel() or sharded
        return {name: parameter.numel() for parameter, name in names.items()}, held

    ranks = run_ranks(2, weights, Layout(2, distributed_optimizer=sharded), timeout_s=120)
    whole = ranks[0][0]
    for name, size in whole.items():
        held = [each.get(name, 0) for _, each in ranks]
        assert held == [size, size] if not sharded else sum(held) == size, name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "sharded", [False, True], ids=["to the distributed optimizer", "from the distributed optimizer"]
)
def test_a_checkpoint_of_the_other_form_gives_each_its_own(sharded: bool, precision: str, tmp_path: Path) -> None:
    """Bit for bit, with Adam's moments; `test_reshard.py` sees what fp32 makes of them in the steps after."""
    config = tiny_config("qwen3", precision=precision)

    def kept(state: TrainState) -> dict[tuple[str, str], torch.Tensor]:
        names = parameter_names(state.chunks)
        adam = state.optimizer.chained_optimizers[0].optimizer
        of = {
            names[parameter]: {"master": master, **adam.state[master]}
            for parameter, master in master_weights(state.optimizer)
        }
        return {
            (name, key): value.detach().flatten().clone() for name, each in of.items() for key, value in each.items()
        }

    state = tiny_state(config, Layout(1, distributed_optimizer=sharded))
    for step in range(2):
        train_step(state, tiny_batch(step), 1e-2)
    expected = kept(state)
    data_state = State.fresh(BATCH, ["code", "prose"]).to_dict(0, 1)
    path = checkpoint.Checkpoints(tmp_path).save(state, data_state, checkpoint.Progress(2, 0))
    process_groups.shutdown()
    state = tiny_state(config, Layout(1, distributed_optimizer=not sharded))
    checkpoint.load(path, state)
    found = kept(state)
    process_groups.shutdown()
    assert found.keys() == expected.keys()
    assert {key[1] for key in found} == {"master", "exp_avg", "exp_avg_sq"}
    for key, value in found.items():
        assert torch.equal(value, expected[key]), key
