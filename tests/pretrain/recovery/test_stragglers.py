"""The rank that holds the others up is named, and nobody else."""

import time
from collections.abc import Callable
from typing import Any

import pytest
from process_group import run_ranks
from tiny_run import tiny_batch, tiny_config, tiny_state

from parallel.layout import Layout
from pretrain.config.recovery import RecoveryConfig
from pretrain.recovery.stragglers import RankTime, Stragglers, slowest_first
from pretrain.step import train_step


def test_ranks_are_compared_with_those_of_their_stage() -> None:
    times = [RankTime(0, "a", 0, 1.0), RankTime(1, "a", 0, 1.1), RankTime(2, "b", 1, 5.0), RankTime(3, "b", 1, 10.0)]
    found = [
        (each.time.rank, round(each.ratio, 2), each.of) for each in slowest_first([*times, RankTime(4, "b", 2, 99)])
    ]
    assert found == [(3, 2.0, 2), (1, 1.1, 2), (0, 1.0, 2), (2, 1.0, 2)]


def slowed(layout: Layout, slow: int | None) -> tuple[list[str], list[dict[str, float]]]:
    """What is told in eight steps, the first four of them with a rank whose forward passes really take longer."""
    state = tiny_state(tiny_config(), layout)
    stragglers = Stragglers(
        RecoveryConfig(stragglers_every=4, straggler_factor=2.0), state.ranks, state.chunks[0].config
    )
    told: list[str] = []
    records = []
    for step in range(8):
        wait_s = 5.0 if slow == state.ranks.rank and step < 4 else 1.0  # a second: the machine's own noise is less

        def delay(module: Any, inputs: Any, wait_s: float = wait_s) -> None:
            time.sleep(wait_s)

        hook = state.chunks[0].register_forward_pre_hook(delay)
        stragglers.begin(step)
        train_step(state, tiny_batch(step, state.ranks.dp_rank, state.ranks.dp_size, 4), 1e-3)
        hook.remove()
        records.append(stragglers.after(step, told.append))
    return told, records


@pytest.mark.multiprocess
def test_a_rank_that_is_really_slowed_is_named_until_it_is_not() -> None:
    import socket

    check: Callable[..., Any] = run_ranks
    for told, records in check(2, slowed, Layout(2), 1, timeout_s=120):
        assert len(told) == 2
        assert told[0].startswith(f"step 3: rank 1 on {socket.gethostname()} is a straggler: it computes for ")
        assert told[1] == "step 7: rank 1 is no straggler any more"
        assert [bool(record) for record in records] == [False, False, False, True] * 2
        assert records[3]["slowest_rank"] == 1
        assert records[3]["slowest_rank_ratio"] > 2.0
