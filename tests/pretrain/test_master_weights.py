"""Every parameter has one master weight, in fp32 and of its values, whatever the optimizer."""

from typing import Any

import pytest
import torch
from process_group import run_ranks
from tiny_run import tiny_config, tiny_state

from parallel.layout import Layout
from parallel.parameter_names import parameter_names
from pretrain.master_weights import master_weights


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
