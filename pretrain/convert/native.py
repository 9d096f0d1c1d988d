"""The weights of a checkpoint, read and written by name with nothing but torch's checkpoint files.

A checkpoint of any layout is the same set of whole tensors cut at other places; reading one tensor gathers its pieces.
Optimizer state is neither read nor written.
"""

import io
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from headrace.errors import CheckpointError
from parallel.parameter_names import HEADS
from pretrain.convert.stored_metadata import read_metadata
from pretrain.convert.tensors import Native, check_finite

# What megatron-core 0.16.1 writes beside torch's files, and asks for when it loads.
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
LAYERS = "decoder.layers."
NOT_WEIGHTS = ("optimizer.", "chained_", HEADS)
LINEAR_LAYERS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


class NativeReader:
    """Whole tensors of the checkpoint in a folder. Raises CheckpointError when it does not hold just `expected`.

    Multi-token heads are passed over: only training uses them, and no other format has a place for them. A checkpoint
    may hold the tensors of a layer stacked with those of the others, as ours and most of Megatron-LM's do, or by itself
    (`decoder.layers.3.mlp.linear_fc1.weight`).
    """

    def __init__(self, path: Path, expected: Iterable[Native]) -> None:
        self.path = path
        self._stored = StoredTensors(path)
        self._check(list(expected))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights: their own where they all have the same, float32 otherwise."""
        found = {stored.properties.dtype for stored in self._stored.tensors.values()}
        return found.pop() if len(found) == 1 else torch.float32

    def read(self, native: Native) -> torch.Tensor:
        """One tensor, `native.shape`, on the CPU. Raises CheckpointError when it is damaged or holds NaN."""
        name = f"{self.path}: {native.key}" + ("" if native.layer is None else f" of layer {native.layer}")
        tensor = self._stored.read(self._key(native), None if self._is_single(native) else native.layer)
        check_finite(tensor, name)
        return tensor.view(native.shape).to(self.dtype)

    def _is_single(self, native: Native) -> bool:
        return native.layer is None or native.key not in self._stored.tensors

    def _key(self, native: Native) -> str:
        if native.layer is None or native.key in self._stored.tensors:
            return native.key
        return native.key.replace(LAYERS, f"{LAYERS}{native.layer}.", 1)

    def _check(self, expected: list[Native]) -> None:
        layers: dict[str, int] = {}
        for native in expected:
            layers[native.key] = layers.get(native.key, 0) + 1
        for native in expected:
            stored = self._stored.tensors.get(self._key(native))
            shape = native.shape if self._is_single(native) else (layers[native.key], *native.shape)
            if stored is None or tuple(stored.size) != shape:
                found = "missing" if stored is None else f"of shape {tuple(stored.size)}"
                raise CheckpointError(f"{self.path}: {self._key(native)} is {found}, the model needs {shape}")
        unknown = sorted(set(self._stored.tensors) - set(map(self._key, expected)))
        if unknown:
            raise CheckpointError(f"{self.path}: holds {', '.join(unknown[:3])}, which the model has no place for")


class StoredTensors:
    """The tensors of a torch_dist checkpoint folder, optimizer state and multi-token heads left out.

    Raises CheckpointError when the folder cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = FileSystemReader(path)
        metadata = read_metadata(path)
        self._files.set_up_storage_reader(metadata, is_coordinator=True)
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: value
            for key, value in metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata) and not key.startswith(NOT_WEIGHTS)
        }

    def read(self, key: str, row: int | None = None) -> torch.Tensor:
        """The tensor called `key`, or row `row` of its first axis (that axis kept), on the CPU."""
        stored = self.tensors[key]
        sizes = torch.Size(stored.size if row is None else [1, *stored.size[1:]])
        offsets = torch.Size([0 if row is None or axis else row for axis in range(len(sizes))])
        items = create_read_items_for_chunk_list(key, stored, [ChunkStorageMetadata(offsets, sizes)])
        if sum(math.prod(item.lengths) for item in items) != sizes.numel():
            raise CheckpointError(f"{self.path}: pieces of {key} are missing")
        target = torch.empty(sizes, dtype=stored.properties.dtype)
        try:
            self._files.read_data(LoadPlan(items), _Into(target)).wait()
        except FileNotFoundError as error:
            raise CheckpointError(f"{self.path}: {key} cannot be read: {error.filename} is missing") from None
        except Exception as error:
            raise CheckpointError(f"{self.path}: {key} cannot be read: {_first_line(error)}") from None
        return target


class _Into(DefaultLoadPlanner):
    """Puts what is read into one tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        ranges = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self._target[tuple(slice(start, start + length) for start, length in ranges)]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass


def write_weights(
    path: Path, tensors: Iterable[Native], dtype: torch.dtype, make: Callable[[Native], torch.Tensor]
) -> None:
    """Write a checkpoint of weights into the empty folder `path`; `make` is asked for each tensor when it is due.

    Raises OSError.
    """
    natives = list(tensors)
    layers = 1 + max((native.layer for native in natives if native.layer is not None), default=-1)
    pending = {_index(native): native for native in natives}
    items = [_write_item(native, layers, dtype) for native in natives]
    items += [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in _extra_states(layers)]
    (plan,), metadata = create_default_global_save_plan([SavePlan(items)])
    writer = FileSystemWriter(path)
    writer.set_up_storage_writer(is_coordinator=True)
    (plan,) = writer.prepare_global_plan([writer.prepare_local_plan(plan)])
    results = writer.write_data(plan, _OnDemand(lambda index: make(pending[index]))).wait()
    writer.finish(metadata, [results])
    torch.save({}, path / "common.pt")
    (path / "metadata.json").write_text(json.dumps(FORMAT))


class _OnDemand(DefaultSavePlanner):
    """Gives a tensor when it is to be written and not before, so that one is in memory at a time."""

    def __init__(self, make: Callable[[MetadataIndex], torch.Tensor]) -> None:
        super().__init__()
        self._make = make

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.type == WriteItemType.BYTE_IO:
            nothing = io.BytesIO()
            torch.save([None], nothing)
            return nothing
        assert write_item.tensor_data is not None
        return self._make(_bare(write_item.index)).view(write_item.tensor_data.chunk.sizes)


def _index(native: Native) -> MetadataIndex:
    offset = [0] * len(native.shape) if native.layer is None else [native.layer, *[0] * len(native.shape)]
    return MetadataIndex(native.key, torch.Size(offset))


def _bare(index: MetadataIndex) -> MetadataIndex:
    """`index` without the hint that planning adds to it."""
    return MetadataIndex(index.fqn, index.offset)


def _write_item(native: Native, layers: int, dtype: torch.dtype) -> WriteItem:
    stacked = native.layer is not None
    size = torch.Size([layers, *native.shape] if stacked else native.shape)
    chunk = ChunkStorageMetadata(_index(native).offset or torch.Size(), torch.Size([1, *size[1:]]) if stacked else size)
    data = TensorWriteData(chunk, TensorProperties(dtype), size)
    return WriteItem(_index(native), WriteItemType.SHARD, tensor_data=data)


def _extra_states(layers: int) -> Iterator[str]:
    """megatron's linear layers have an `_extra_state` (for fp8), empty here; loading asks for each."""
    for layer in range(layers):
        for name in LINEAR_LAYERS:
            yield f"decoder.layers.{name}._extra_state/shard_{layer}_{layers}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
