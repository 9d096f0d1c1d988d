"""Which pairs of nodes measure together, and that real processes do."""

import itertools
import json
import os
from pathlib import Path

import pytest
from process_group import run_ranks

from parallel import bandwidth


@pytest.mark.parametrize("nodes", range(1, 12))
def test_every_node_measures_with_both_neighbours_and_never_twice_at_once(nodes: int) -> None:
    turns = bandwidth.pairs(nodes)
    for turn in turns:
        busy = list(itertools.chain(*turn))
        assert len(busy) == len(set(busy))
    partners: dict[int, set[int]] = {node: set() for node in range(nodes)}
    for a, b in itertools.chain(*turns):
        partners[a].add(b)
        partners[b].add(a)
    wanted = {1: 0, 2: 1}.get(nodes, 2)
    assert all(len(found) == wanted for found in partners.values())
    assert len(turns) <= 3


@pytest.mark.multiprocess
def test_every_node_writes_its_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three nodes of two processes, small messages."""
    monkeypatch.setattr(bandwidth, "BYTES", 1 << 16)

    def process() -> None:
        rank = int(os.environ["RANK"])
        os.environ.update(SLURM_PROCID=str(rank), SLURM_NTASKS="6", SLURM_LOCALID=str(rank % 2), TASKS_PER_NODE="2")
        os.environ["SLURMD_NODENAME"] = f"mill-{rank // 2}"
        bandwidth.main(str(tmp_path))

    run_ranks(6, process, timeout_s=120)
    for node in range(3):
        answer = json.loads((tmp_path / f"mill-{node}.bandwidth.json").read_text())
        assert answer["node"] == f"mill-{node}"
        assert len(answer["allreduce_gb_per_s"]) == 2
        assert all(rate > 0 for rate in answer["allreduce_gb_per_s"])
