"""Saves the state of a tiny run under one layout and goes on from it under another."""

from pathlib import Path

import torch.distributed as dist
from tiny_run import tiny_batch, tiny_state

from parallel.engine import dist_checkpointing
from parallel.layout import Layout
from pretrain import checkpoint
from pretrain.config import RunConfig
from pretrain.optimizer import restore
from pretrain.step import StepResult, TrainState, train_step


def go_on(state: TrainState, config: RunConfig, first: int, last: int) -> list[StepResult]:
    """Steps `first` to `last`, exclusive."""
    ranks, size = state.ranks, config.train.micro_batch_size
    return [
        train_step(state, tiny_batch(step, ranks.dp_rank, ranks.dp_size, size), config.optimizer.lr)
        for step in range(first, last)
    ]


def save_then_go_on(config: RunConfig, layout: Layout, folder: Path, saved_at: int, steps: int) -> list[StepResult]:
    """A fresh run that is saved to `folder` after `saved_at` steps; the steps after that."""
    state = tiny_state(config, layout)
    go_on(state, config, 0, saved_at)
    if state.ranks.rank == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(checkpoint.sharded_state(state), str(folder))
    return go_on(state, config, saved_at, saved_at + steps)


def load_then_go_on(config: RunConfig, layout: Layout, folder: Path, saved_at: int, steps: int) -> list[StepResult]:
    """The same steps by a new process that starts from `folder`."""
    state = tiny_state(config, layout)
    loaded = checkpoint._load(folder, checkpoint.sharded_state(state, loading=True), state)
    restore(state.optimizer, loaded["optimizer"])
    return go_on(state, config, saved_at, saved_at + steps)
