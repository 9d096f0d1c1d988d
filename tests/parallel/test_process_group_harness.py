"""The fork harness itself: results come back, failures name the rank that failed first, hangs are killed."""

import os
import time
from pathlib import Path

import process_group
import psutil
import pytest
import torch
import torch.distributed as dist
from process_group import RanksFailedError, run_ranks

from parallel import process_groups
from parallel.layout import Layout

pytestmark = pytest.mark.multiprocess


def _start(world_size: int) -> process_groups.Ranks:
    return process_groups.initialize(Layout(world_size), seed=1, timeout_s=60)


def test_ranks_return_their_results_in_order() -> None:
    def work(base: int) -> tuple[int, int]:
        ranks = _start(3)
        total = torch.tensor([ranks.rank + base])
        process_groups.sum_over_data_parallel(total)
        return ranks.rank, int(total)

    assert run_ranks(3, work, 10) == [(0, 33), (1, 33), (2, 33)]


def test_the_rank_that_failed_first_is_named() -> None:
    def work() -> None:
        ranks = _start(2)
        if ranks.rank == 1:
            raise ValueError("the real reason")
        dist.barrier()

    with pytest.raises(RanksFailedError, match=r"rank 1 of 2 failed first(.|\n)*the real reason"):
        run_ranks(2, work)


def test_a_rank_that_dies_without_a_word_is_named() -> None:
    def work() -> None:
        if _start(2).rank == 0:
            os._exit(7)
        dist.barrier()

    with pytest.raises(RanksFailedError, match=r"rank 0 of 2 failed first(.|\n)*ended with 7"):
        run_ranks(2, work)


def test_a_hang_is_killed_and_shows_stacks() -> None:
    def work() -> None:
        _start(2)
        time.sleep(1000)

    before = set(psutil.Process().children())  # other tests of this process may have left services running
    with pytest.raises(RanksFailedError, match=r"no result after 3 s(.|\n)*in work"):
        run_ranks(2, work, timeout_s=3)
    assert set(psutil.Process().children()) <= before


def test_forks_of_a_process_that_computed_with_threads() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        a = torch.randn(512, 512, requires_grad=True)
        (a @ a).exp().sum().backward()
    finally:
        torch.set_num_threads(threads)

    def work() -> float:
        _start(2)
        b = torch.ones(512, 512, requires_grad=True)
        (b @ b).sum().backward()
        assert b.grad is not None
        return float(b.grad[0, 0])

    assert run_ranks(2, work) == [1024.0, 1024.0]


def test_ranks_that_never_join_are_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group, "JOIN_S", 1.0)

    def work() -> int:
        rank = int(os.environ["RANK"])
        if not (first := tmp_path / str(rank)).exists():
            first.touch()
            dist.init_process_group("gloo", rank=rank, world_size=3)  # waits for a third
        return _start(2).rank

    with pytest.warns(UserWarning, match="2 ranks did not find each other"):
        assert run_ranks(2, work) == [0, 1]
