"""What is in a checkpoint, whatever it is a checkpoint of: names, shapes, types, numbers that are none."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from headrace.errors import CheckpointError
from pretrain.convert.native import StoredTensors
from pretrain.convert.safetensors_folder import SafetensorsReader
from pretrain.convert.stored_model import find_checkpoint

STACK = re.compile(r"decoder\.layers\.(?!\d)")
"""Begins the names of tensors that hold all layers; after a layer's number comes one layer's own."""


class TensorFacts(NamedTuple):
    """One tensor of a checkpoint."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    numel: int
    not_finite: int
    """NaN and infinite values."""


def inspect(path: Path, step: int | None = None) -> Iterator[TensorFacts]:
    """Every weight of a run's checkpoint, a Hugging Face folder or a torch_dist folder, one in memory at a time.

    Optimizer state is left out. Raises CheckpointError.
    """
    if (path / ".metadata").is_file():
        yield from _torch_dist(path)
    elif (path / "checkpoints").is_dir():
        yield from _torch_dist(find_checkpoint(path, step))
    elif path.is_dir() and any(path.glob("*.safetensors*")):
        reader = SafetensorsReader(path)
        for name in reader.names():
            yield _facts(name, reader.read(name, finite=False))
    else:
        what = "no weights in this folder" if path.is_dir() else "no such folder"
        raise CheckpointError(f"{path}: {what}; name a run, a Hugging Face folder or a torch_dist folder")


def _torch_dist(path: Path) -> Iterator[TensorFacts]:
    stored = StoredTensors(path)
    for name, tensor in sorted(stored.tensors.items()):
        if not STACK.match(name) or len(tensor.size) < 2:
            yield _facts(name, stored.read(name))
            continue
        rows = [_facts(name, stored.read(name, row)) for row in range(tensor.size[0])]  # a stack: layer by layer
        bad = sum(row.not_finite for row in rows)
        yield TensorFacts(name, tuple(tensor.size), rows[0].dtype, tensor.size.numel(), bad)


def _facts(name: str, tensor: torch.Tensor) -> TensorFacts:
    dtype = str(tensor.dtype).removeprefix("torch.")
    # torch has no isfinite for types of one byte; a wider one holds their values exactly.
    wide = tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
    bad = tensor.numel() - int(torch.isfinite(wide).sum())
    return TensorFacts(name, tuple(tensor.shape), dtype, tensor.numel(), bad)
