"""A run small enough for tests: a model of four layers, random tokens, packed documents of uneven length."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from parallel import process_groups
from parallel.layout import Layout
from pretrain.config import KernelsConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig, validate_config
from pretrain.microbatch import MicroBatch, split_batch
from pretrain.step import StepResult, TrainState, build_state, train_step

VOCAB, SEQ_LEN, BATCH = 128, 32, 8
PAIRS = {
    "dp2": Layout(2),
    "dp2 distributed optimizer": Layout(2, distributed_optimizer=True),
    "tp2": Layout(2, tensor_parallel_size=2),
    "tp2+sp": Layout(2, tensor_parallel_size=2, sequence_parallel=True),
    "pp2": Layout(2, pipeline_parallel_size=2),
    "pp2 interleaved": Layout(2, pipeline_parallel_size=2, virtual_pipeline_parallel_size=2),
    "cp2": Layout(2, context_parallel_size=2),
    "cp2 distributed optimizer": Layout(2, context_parallel_size=2, distributed_optimizer=True),
}
"""Every direction a model is spread in, over two processes; `layout_matrix.py` has all that there are."""


def tiny_config(family: str = "llama", **changes: Any) -> RunConfig:
    """A run's configuration; `changes` are keys of its model, train or optimizer section."""
    sections: dict[str, dict[str, Any]] = {
        "model": {
            "family": family,
            "num_layers": 4,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_query_groups": 4 if family == "wonton" else 2,
            "ffn_hidden_size": 128,
        },
        "train": {"steps": 5, "micro_batch_size": 2},
        # At 1e-2 rounding differences grow to 8e-5 of the gradient norm in five steps, at 1e-3 they stay below 1e-6.
        "optimizer": {"lr": 1e-3},
    }
    sources = [{"name": name, "paths": [name]} for name in ("code", "prose")]
    data = {"tokenizer": "t", "sources": sources, "seq_len": SEQ_LEN, "global_batch_size": BATCH, "lanes": BATCH}
    for key, value in changes.items():
        sections_of = {"train": TrainConfig, "optimizer": OptimizerConfig, "model": ModelConfig}
        section = next(name for name, fields in sections_of.items() if key in fields.model_fields)
        sections[section][key] = value
    return validate_config({"run": {"dir": "unused"}, "data": data, **sections}, "tiny")


def with_kernels(config: RunConfig, **kernels: str) -> RunConfig:
    """`config` with other entries under `kernels:`."""
    return config.model_copy(update={"kernels": KernelsConfig.model_validate(config.kernels.model_dump() | kernels)})


def tiny_batch(
    step: int, dp_rank: int = 0, dp_size: int = 1, micro_batch_size: int = 2, weighted: bool = False
) -> list[MicroBatch]:
    """A rank's share of the global batch of `step`, the same batch for every `dp_size`; `weighted`: tokens of source 0
    weigh 0, 0.5 or 2 in the loss."""
    random = np.random.default_rng(step)
    tokens = random.integers(0, VOCAB, (BATCH, SEQ_LEN + 1))
    starts = []
    for _ in range(BATCH):
        inner = np.sort(random.choice(np.arange(1, SEQ_LEN + 1), size=random.integers(0, 4), replace=False))
        starts.append(np.concatenate(([0], inner)).astype(np.int32))
    sources = random.integers(0, 2, BATCH)
    weights = None
    if weighted:
        drawn = random.choice(np.array([0.0, 0.5, 2.0], np.float32), (BATCH, SEQ_LEN + 1))
        weights = [row if source == 0 else None for row, source in zip(drawn, sources, strict=True)]
    mine = slice(dp_rank, None, dp_size)
    return split_batch(tokens[mine], starts[mine], sources[mine], micro_batch_size, weights and weights[mine])


def tiny_state(config: RunConfig, layout: Layout) -> TrainState:
    """Process groups, model and optimizer of this process."""
    ranks = process_groups.initialize(layout, seed=config.train.seed, timeout_s=60)
    return build_state(config, layout, ranks, VOCAB)


def tiny_steps(config: RunConfig, layout: Layout, steps: int = 5, weighted: bool = False) -> list[StepResult]:
    """A fresh run of `steps` steps in this process, process groups opened (and closed, when it is the only one)."""
    state = tiny_state(config, layout)
    size = config.train.micro_batch_size
    ranks = state.ranks
    results = [
        train_step(state, tiny_batch(step, ranks.dp_rank, ranks.dp_size, size, weighted), config.optimizer.lr)
        for step in range(steps)
    ]
    if layout.world_size == 1:
        process_groups.shutdown()
    return results


def single_process(config: RunConfig, steps: int = 5) -> list[StepResult]:
    """What one process makes of `config`; computed once."""
    return _computed(config.model_dump_json(), steps)


@functools.cache
def _computed(config: str, steps: int) -> list[StepResult]:
    return tiny_steps(RunConfig.model_validate_json(config), Layout(1), steps)


def assert_same_curve(results: Sequence[StepResult], expected: Sequence[StepResult], tolerance: float = 1e-5) -> None:
    """Same tokens, and losses and gradient norms to a relative `tolerance`."""
    for result, one in zip(results, expected, strict=True):
        assert result.loss == pytest.approx(one.loss, rel=tolerance)
        assert result.grad_norm == pytest.approx(one.grad_norm, rel=tolerance)
        assert result.source_tokens.tolist() == one.source_tokens.tolist()
        assert not result.skipped
