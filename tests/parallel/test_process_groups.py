"""Joining and leaving: environment in, ranks out; wrong numbers are refused in one line."""

import pytest
import torch
import torch.distributed as dist
from process_group import run_ranks

from headrace.errors import ConfigError, LayoutError
from parallel import process_groups
from parallel.layout import Layout


def test_a_single_process_needs_no_environment_and_can_start_again() -> None:
    for _ in range(2):
        ranks = process_groups.initialize(Layout(1), seed=1)
        assert (ranks.rank, ranks.world_size, ranks.dp_size) == (0, 1, 1)
        assert ranks.is_first_stage
        assert ranks.is_last_stage
        assert process_groups.broadcast_object({"a": 1}) == {"a": 1}
        process_groups.shutdown()
        assert not dist.is_initialized()
    process_groups.shutdown()


def test_another_number_of_processes_is_refused() -> None:
    with pytest.raises(LayoutError, match="the layout is for 2 processes, the launcher started 1"):
        process_groups.initialize(Layout(2), seed=1)


def test_a_broken_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match="WORLD_SIZE must be a whole number, got 'two'"):
        process_groups.environment_world_size()


@pytest.mark.multiprocess
def test_sums_span_data_and_context_but_not_tensor_or_pipeline_ranks() -> None:
    def sums(layout: Layout) -> int:
        rank = process_groups.initialize(layout, seed=1, timeout_s=60).rank
        return int(process_groups.sum_over_data_parallel(torch.tensor([10**rank])))

    assert run_ranks(4, sums, Layout(4, tensor_parallel_size=2)) == [101, 1010, 101, 1010]
    assert run_ranks(4, sums, Layout(4, context_parallel_size=2)) == [1111] * 4
    assert run_ranks(4, sums, Layout(4, pipeline_parallel_size=2)) == [11, 11, 1100, 1100]


@pytest.mark.multiprocess
def test_the_last_stage_tells_its_own_pipeline() -> None:
    def told() -> tuple[int, list[int], str]:
        rank = process_groups.initialize(Layout(4, pipeline_parallel_size=2), seed=1, timeout_s=60).rank
        value = int(process_groups.broadcast_from_last_stage(torch.tensor([rank])))
        return value, process_groups.gather_objects(rank), process_groups.broadcast_object(f"from {rank}", source=2)

    everyone = ([0, 1, 2, 3], "from 2")
    assert run_ranks(4, told) == [(2, *everyone), (3, *everyone), (2, *everyone), (3, *everyone)]
