"""How fast nodes exchange gradients: `python -m parallel.bandwidth FOLDER` in every process, before a run.

Each node and its neighbours, two nodes at a time, all their processes together, all-reduce 64 MB a process; a node's
rates stand in `FOLDER/<node>.bandwidth.json`. A node that is slow with both neighbours has a slow link of its own; one
that is slow with one of them has a slow neighbour. (One over all nodes would only say that some node is slow.)

Rates are bus bandwidths, 2 (n - 1) / n · bytes / seconds for n processes, in GB/s: the wire's share of the work, which
does not depend on n (NVIDIA's nccl-tests, doc/PERFORMANCE.md).
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from parallel import accelerator

BYTES = 64 << 20
"""A gradient bucket's size; on a CPU a sixteenth of it."""
ROUNDS = 5


def pairs(nodes: int) -> list[list[tuple[int, int]]]:
    """Neighbours on a ring of nodes, in turns in which no node is busy twice: 3 nodes take three turns, 4 take two."""
    ring = [(node, (node + 1) % nodes) for node in range(nodes if nodes > 2 else nodes - 1)]
    last = [ring.pop()] if nodes > 2 and nodes % 2 else []
    return [turn for turn in (ring[::2], ring[1::2], last) if turn]


def measure(group: "dist.ProcessGroup", size: int) -> float:
    """Bus bandwidth of an all-reduce within `group`, GB/s; the best of some rounds, for the first ones connect."""
    numbers = torch.ones(size // 4, dtype=torch.float32, device=accelerator.device())
    count, best = dist.get_world_size(group), 0.0
    for _ in range(ROUNDS):
        accelerator.synchronize()
        began = time.perf_counter()
        dist.all_reduce(numbers, group=group)
        accelerator.synchronize()
        best = max(best, 2 * (count - 1) / count * size / (time.perf_counter() - began) / 1e9)
    return best


def main(folder: str) -> None:
    """Measure with every other node; the first process of each node writes its rates."""
    rank, world_size = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    local, per_node = int(os.environ["SLURM_LOCALID"]), int(os.environ["TASKS_PER_NODE"])
    os.environ["LOCAL_RANK"] = str(local)
    dist.init_process_group(accelerator.backend(), rank=rank, world_size=world_size)
    node, rates = rank // per_node, []
    for turn in pairs(world_size // per_node):
        for pair in turn:
            members = [which * per_node + at for which in pair for at in range(per_node)]
            group = dist.new_group(members)  # every process must call this, members or not
            if node in pair:
                assert group is not None
                rates.append(measure(group, BYTES if accelerator.has_gpu() else BYTES // 16))
    if local == 0:
        name = os.environ["SLURMD_NODENAME"]
        answer = {"node": name, "allreduce_gb_per_s": rates}
        partial = Path(folder) / f"{name}.bandwidth.json.partial"
        partial.write_text(json.dumps(answer))
        partial.rename(partial.with_suffix(""))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
