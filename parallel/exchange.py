"""What ranks tell each other besides gradients: small exact facts about a step, and who failed.

On one process every function returns at once; none is called inside a forward or backward pass.
"""

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from headrace.errors import HeadraceError
from parallel import accelerator, process_groups
from parallel.engine import parallel_state

T = TypeVar("T")


def gather_bytes_over_data_parallel(own: bytes) -> list[bytes]:
    """Every data-parallel rank's bytes, in rank order; all must be of one length."""
    group = parallel_state.get_data_parallel_group()
    size = dist.get_world_size(group)
    if size == 1:
        return [own]
    sent = torch.frombuffer(bytearray(own), dtype=torch.uint8).to(accelerator.device())
    received = torch.empty(size * len(own), dtype=torch.uint8, device=sent.device)
    dist.all_gather_into_tensor(received, sent, group=group)
    flat = received.cpu().numpy().tobytes()
    return [flat[rank * len(own) : (rank + 1) * len(own)] for rank in range(size)]


def largest(values: list[float]) -> list[float]:
    """The largest over all processes of each value, float64."""
    if dist.get_world_size() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=accelerator.device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    result: list[float] = tensor.tolist()
    return result


def gather_floats(own: list[float]) -> list[list[float]]:
    """Every process's values, in rank order, float64; all must give as many."""
    if dist.get_world_size() == 1:
        return [own]
    sent = torch.tensor(own, dtype=torch.float64, device=accelerator.device())
    received = torch.empty(dist.get_world_size() * len(own), dtype=torch.float64, device=sent.device)
    dist.all_gather_into_tensor(received, sent)
    result: list[list[float]] = received.reshape(-1, len(own)).tolist()
    return result


def gather_arrays(own: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    """Every data-parallel rank's array, in rank order; all must be of one shape and type."""
    parts = gather_bytes_over_data_parallel(np.ascontiguousarray(own).tobytes())
    return [np.frombuffer(part, dtype=own.dtype).reshape(own.shape) for part in parts]


def first_rank_first(make: Callable[[], T], rank: int) -> T:
    """`make()` on rank 0, then on all others: for what rank 0 writes and the others read.

    A HeadraceError on rank 0 is raised on every rank, so that none waits for a rank that has left.
    """
    if dist.get_world_size() == 1:
        return make()
    if rank == 0:
        return _tell(make)
    _hear()
    return make()


def only_first_rank(act: Callable[[], None], rank: int) -> None:
    """`act()` on rank 0 while the others wait; its HeadraceError or OSError is raised on every rank."""
    if dist.get_world_size() == 1:
        act()
    elif rank == 0:
        _tell(act)
    else:
        _hear()


def from_first_rank(make: Callable[[], T], rank: int) -> T:
    """What `make()` gives on rank 0, on every rank; its HeadraceError or OSError is raised on every rank."""
    made: list[T] = []
    only_first_rank(lambda: made.append(make()), rank)
    result: T = made[0] if dist.get_world_size() == 1 else process_groups.broadcast_object(made[0] if made else None)
    return result


def agree(act: Callable[[], T]) -> T:
    """`act()` on every rank at once; when it raises a HeadraceError or OSError on any, every rank raises that one."""
    problem: Exception | None = None
    result: T | None = None
    try:
        result = act()
    except (HeadraceError, OSError) as error:
        problem = error
    if dist.get_world_size() == 1:
        if problem is not None:
            raise problem
        return result  # type: ignore[return-value]
    problems = [found for found in process_groups.gather_objects(_portable(problem)) if found is not None]
    if problems:
        raise pickle.loads(problems[0])
    return result  # type: ignore[return-value]


def _tell(act: Callable[[], T]) -> T:
    try:
        result = act()
    except (HeadraceError, OSError) as error:
        _announce(error)
        raise
    _announce(None)
    return result


def _announce(problem: Exception | None) -> None:
    process_groups.await_first_rank(is_ready=True)
    process_groups.broadcast_object(_portable(problem))


def _hear() -> None:
    """Raises what the first rank raised."""
    process_groups.await_first_rank(is_ready=False)
    problem = process_groups.broadcast_object(None)
    if problem is not None:
        raise pickle.loads(problem)  # from our own rank 0, over the run's process group


def _portable(error: Exception | None) -> bytes | None:
    """An exception as bytes: HeadraceErrors and OSErrors pickle by class and arguments."""
    return None if error is None else pickle.dumps(error)
