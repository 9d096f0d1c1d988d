"""Process groups: from environment variables and a `Layout` to this process's place in the grid, and back to nothing.

Also the few collectives a training loop needs by name (`sum_over_data_parallel`, `broadcast_from_last_stage`), so that
nobody outside this package handles process groups.
"""

import os
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from headrace.errors import ConfigError, LayoutError
from parallel import accelerator
from parallel.engine import expert_losses, parallel_state, tensor_parallel
from parallel.layout import Layout

LOOPBACK = ("127.0.0.1", "localhost", "::1")
LONGEST_LOOK_S = 0.5
"""Between two looks into the store, by ranks that wait for the first one."""
_awaited = 0
"""Times that the first rank was waited for, the same on every rank: each has a key in the store."""


@dataclass(frozen=True)
class Ranks:
    """This process's place in the grid."""

    rank: int
    world_size: int
    dp_rank: int
    dp_size: int
    tp_rank: int
    pp_rank: int
    cp_rank: int
    is_first_stage: bool
    """Holds the input embedding."""
    is_last_stage: bool
    """Holds the output head, so knows the loss."""


def environment_world_size() -> int:
    """Number of processes the launcher started (`WORLD_SIZE`, 1 without a launcher); raises ConfigError."""
    return _environment_int("WORLD_SIZE", 1)


def initialize(layout: Layout, seed: int, timeout_s: float = 600.0) -> Ranks:
    """Join the other processes (`RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`) and build all groups of `layout`.

    A single process needs no environment and opens no port. `seed` seeds torch's generators, the same on every rank
    besides tensor- and pipeline-parallel offsets that megatron adds for dropout. A collective that waits longer than
    `timeout_s` fails. Raises LayoutError when the launcher started another number of processes.
    """
    global _awaited
    _awaited = 0
    rank, world_size = _environment_int("RANK", 0), environment_world_size()
    if world_size != layout.world_size:
        raise LayoutError(f"the layout is for {layout.world_size} processes, the launcher started {world_size}")
    timeout = timedelta(seconds=timeout_s)
    if world_size == 1:
        dist.init_process_group(accelerator.backend(), store=HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        if os.environ.get("MASTER_ADDR", "127.0.0.1") in LOOPBACK:
            # gloo otherwise binds to the address of the machine's name, which a laptop or container may not resolve.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        for name, default in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500")):
            os.environ.setdefault(name, default)
        dist.init_process_group(accelerator.backend(), rank=rank, world_size=world_size, timeout=timeout)
    return _build_groups(layout, rank, seed, timeout_s)


def rearrange(layout: Layout, seed: int, timeout_s: float = 600.0) -> Ranks:
    """Leave the groups of the layout so far and build those of another one, of as many processes; every process must.

    Nothing may be left that uses the old groups. The group of all processes stays, so that no port is opened anew.
    """
    dist.barrier()
    groups = [group for group in parallel_state._global_process_group_list or () if group is not None]
    _forget_groups()
    for group in groups:
        dist.destroy_process_group(group)
    return _build_groups(layout, dist.get_rank(), seed, timeout_s)


def _build_groups(layout: Layout, rank: int, seed: int, timeout_s: float) -> Ranks:
    """megatron's groups among the processes that have joined, and this one's place in them."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_parallel_size,
        context_parallel_size=layout.context_parallel_size,
        expert_model_parallel_size=layout.expert_parallel_size,
        # Experts are small; and where they are split, ranks gather tokens of uneven number, which gloo cannot.
        expert_tensor_parallel_size=1,
        # Under gloo every group is one already; under NCCL nothing of ours gathers on the host.
        create_gloo_process_groups=False,
        distributed_timeout_minutes=max(1, round(timeout_s / 60)),
    )
    accelerator.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    pp, dp, cp, tp = layout.coordinates(rank)
    ranks = Ranks(
        rank=rank,
        world_size=layout.world_size,
        dp_rank=dp,
        dp_size=layout.data_parallel_size,
        tp_rank=tp,
        pp_rank=pp,
        cp_rank=cp,
        is_first_stage=pp == 0,
        is_last_stage=pp == layout.pipeline_parallel_size - 1,
    )
    # Layout.coordinates is what people are shown and what data is dealt by; megatron must agree.
    assert (tp, pp, cp, dp, layout.expert_rank(rank)) == (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_expert_model_parallel_rank(),
    ), f"rank {rank}: {ranks} is not where megatron put it"
    return ranks


def shutdown() -> None:
    """Wait for the others, then leave. Leaving at once aborts 20 to 58 % of runs whose last act was a backward pass."""
    if not dist.is_initialized():
        return
    dist.barrier()
    _forget_groups()
    dist.destroy_process_group()


def _forget_groups() -> None:
    parallel_state.destroy_model_parallel()
    expert_losses().clear()  # megatron-core's notes on routing, which keep groups for good
    # Left behind by the line above (megatron-core 0.16.1); it would keep the group's threads, and the group of the next
    # `initialize` would end them at a moment of its own.
    parallel_state._INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP = None


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone: nothing here is at fault, a restart helps."""
    # gloo raises plain RuntimeErrors that name its source file.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def world() -> Any:
    """The group of all processes."""
    return dist.group.WORLD


def await_first_rank(is_ready: bool) -> None:
    """Wait until the first rank calls this, with `is_ready`, however long it takes: a collective would give up after
    its timeout. One that has died ends the wait, as its store goes with it."""
    global _awaited
    _awaited += 1
    store = dist.distributed_c10d._get_default_store()
    key = f"headrace/first-rank/{_awaited}"
    if is_ready:
        store.set(key, "ready")
        return
    pause_s = 0.001
    while not store.check([key]):  # `wait` would keep other threads, such as NCCL's, from the store meanwhile
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_LOOK_S)


def barrier() -> None:
    """Wait until every process is here."""
    dist.barrier()


def sum_over_data_parallel(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` summed in place over data- and context-parallel ranks; exact and order-free for integers."""
    dist.all_reduce(tensor, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return tensor


def broadcast_from_last_stage(tensor: torch.Tensor) -> torch.Tensor:
    """The last pipeline stage's `tensor`, in place, on every stage."""
    source = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast(tensor, src=source, group=parallel_state.get_pipeline_model_parallel_group())
    return tensor


def share_with_model_parallel(tensor: torch.Tensor) -> torch.Tensor:
    """The last pipeline stage's `tensor`, in place, on every rank that holds a part of the same model.

    Under context parallelism each rank gives its own part of it, and 0 elsewhere. The ranks of a tensor-parallel group
    hold the same already but for what a kernel may leave to chance; they agree on the larger.
    """
    dist.all_reduce(tensor, group=parallel_state.get_context_parallel_group())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=parallel_state.get_tensor_model_parallel_group())
    return broadcast_from_last_stage(tensor)


def sum_over_replicas(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` summed in place over data-parallel ranks alone: what all ranks of one model hold counts once."""
    dist.all_reduce(tensor, group=parallel_state.get_data_parallel_group())
    return tensor


def gather_over_replicas(own: torch.Tensor) -> dict[int, int]:
    """Each data- and context-parallel rank's int64 scalar `own`, by its rank among all processes."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    size = dist.get_world_size(group)
    every = torch.empty(size, dtype=torch.int64, device=own.device)
    dist.all_gather_into_tensor(every, own.reshape(1), group=group)
    return {dist.get_global_rank(group, place): value for place, value in enumerate(every.tolist())}


def sum_over_all(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` summed in place over all processes."""
    dist.all_reduce(tensor)
    return tensor


def largest_over_all(tensor: torch.Tensor) -> torch.Tensor:
    """The largest of all processes, element by element, in place."""
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def sum_over_context_parallel(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` summed in place over the ranks that hold parts of the same sequences."""
    dist.all_reduce(tensor, group=parallel_state.get_context_parallel_group())
    return tensor


def broadcast_object(value: Any, source: int = 0) -> Any:
    """`source`'s picklable `value`, on every process."""
    values = [value]
    dist.broadcast_object_list(values, src=source, device=accelerator.device())
    return values[0]


def gather_objects(value: Any) -> list[Any]:
    """Every process's picklable `value`, in rank order, on every process."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _environment_int(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ConfigError(f"environment variable {name} must be a whole number, got {text!r}")
    return int(text)
