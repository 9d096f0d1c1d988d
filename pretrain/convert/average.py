"""The mean of several checkpoints of a run, or their moving average, as step 0 of a new run."""

from collections.abc import Sequence
from pathlib import Path

import torch

from headrace.errors import CheckpointError, ConfigError
from pretrain.checkpoint import Checkpoints
from pretrain.config import ModelConfig
from pretrain.convert.native import NativeReader
from pretrain.convert.new_run import check_new, new_run
from pretrain.convert.stored_model import find_model
from pretrain.convert.tensors import Native, native_tensors


def average(run: Path, out: Path, last: int, decay: float | None = None) -> tuple[ModelConfig, list[int]]:
    """Average the newest `last` checkpoints of `run` into the run folder `out`; (the model, the steps taken).

    All weigh the same; with `decay` d the average moves, a ← d·a + (1-d)·w, from the oldest of them on. Sums are
    float32, the result has the checkpoints' type. Raises CheckpointError or ConfigError.
    """
    steps = Checkpoints(run).steps()[-last:]
    newest = find_model(run, None)
    if newest.model.num_experts is not None:
        raise ConfigError(f"{run}: model.num_experts: models with experts cannot be averaged; dense ones can")
    if len(steps) < last:
        raise CheckpointError(
            f"{run}: has {len(steps)} checkpoints, not {last}; there are {', '.join(map(str, steps))}"
        )
    check_new(out)
    model = newest.model.model_copy(update={"vocab_size": newest.vocab_size})
    for step in steps:
        if find_model(run, step).meta["model"] != newest.meta["model"]:
            raise ConfigError(f"{run}: the checkpoint of step {step} is of another model than that of step {steps[-1]}")
    natives = list(native_tensors(model, newest.vocab_size))
    readers = [NativeReader(Checkpoints(run).path(step), natives) for step in steps]
    shares = weights(len(steps), decay)

    def make(native: Native) -> torch.Tensor:
        total = torch.zeros(native.shape)
        for reader, share in zip(readers, shares, strict=True):
            total.add_(reader.read(native), alpha=share)
        return total.to(readers[-1].dtype)

    configured = newest.meta["config"]["data"]["tokenizer"]
    tokenizer = None if configured is None else Path(configured).absolute()
    new_run(out, model, natives, readers[-1].dtype, make, newest.seq_len, tokenizer)
    return model, list(steps)


def weights(count: int, decay: float | None) -> Sequence[float]:
    """The share of each of `count` checkpoints, oldest first; they sum to 1."""
    if decay is None:
        return [1.0 / count] * count
    newer = [(1.0 - decay) * decay ** (count - 1 - index) for index in range(1, count)]
    return [decay ** (count - 1), *newer]
