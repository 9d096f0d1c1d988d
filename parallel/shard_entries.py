"""What checkpoints know of a fully sharded chunk: the entries of the whole one, each cut to the rows held here.

So a checkpoint has the same keys and shapes whether the chunk was sharded or not, and either can load the other's. One
weight may be several entries: the two halves of a gated MLP's first matrix are stored as rows of one global tensor.

    linear_fc1.weight, 8 rows, 2 data-parallel ranks        stored          held by rank 0: rows 0 to 3
        rows 0 to 3  gate                                   rows 0 to 3     -> rows 0 to 3
        rows 4 to 7  up                                     rows 4 to 7     -> nothing
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from parallel.engine import ShardedTensor, ShardedTensorFactory, apply_factories, nested_values


@dataclass(frozen=True)
class _Piece:
    """Part of a weight that is stored as one block."""

    first: int
    """Its first row among this tensor-parallel rank's rows of the weight."""
    entry: Any
    """megatron's ShardedTensor of it, without data."""


@dataclass(frozen=True)
class _Held:
    """The rows of a weight that are here."""

    start: int
    stop: int


class ShardEntries:
    """The checkpoint entries of a chunk, taken before its weights are sharded over `group`.

    Weights are stored in `dtype`, whatever that of the shards; optimizer state in its own.
    """

    def __init__(self, chunk: Any, group: Any, dtype: torch.dtype) -> None:
        self.dtype = dtype
        named = {id(parameter): (name, parameter) for name, parameter in chunk.named_parameters()}
        whole = chunk.sharded_state_dict(metadata={"dp_cp_group": group, "singleton_local_shards": False})
        self.names: dict[str, str] = {}
        """Name of the parameter by key of the state dict."""
        self._others: dict[str, Any] = {}
        self._pieces: dict[str, list[_Piece]] = {}
        self._held: dict[str, _Held] = {}
        for key, entry in whole.items():
            if not isinstance(entry, ShardedTensor | ShardedTensorFactory):
                self._others[key] = entry
                continue
            name, parameter = named[id(entry.data)]
            self.names[key] = name
            self._pieces[key] = [_piece(block, parameter) for block in _blocks(entry)]
            self._held[key] = _held(parameter.size(0), group.size(), group.rank())
        missing = {name for name, _ in named.values()} - set(self.names.values())
        assert not missing, f"not in the state dict: {sorted(missing)}"

    def of(self, shards: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """megatron's sharded state dict of `shards`, this rank's rows by name; their objects are found in it by id."""
        entries = {
            key: ShardedTensorFactory(
                key=self._pieces[key][0].entry.key,
                data=shards[name],
                build_fn=lambda stored, data, *_, key=key: self._build(key, stored, data),
                merge_fn=lambda blocks, stacked=self._pieces[key][0].entry.prepend_axis_num: torch.cat(
                    [block.flatten(0, stacked) for block in blocks]
                ),
            )
            for key, name in self.names.items()
            if shards[name].numel()
        }
        return entries | self._others

    def _build(self, key: str, stored_key: str, data: torch.Tensor) -> list[Any]:
        held = self._held[key]
        is_optimizer_state = stored_key != self._pieces[key][0].entry.key
        if not is_optimizer_state:
            data = data.detach().to(self.dtype)
        blocks = []
        for piece in self._pieces[key]:
            entry = piece.entry
            first = max(held.start, piece.first)
            last = min(held.stop, piece.first + entry.local_shape[0])
            if first >= last:
                continue
            stacked = entry.prepend_axis_num  # leading axes that stack layers; the one that counts rows comes next
            offset = list(entry.global_offset)
            offset[stacked] += first - piece.first
            rows = data[first - held.start : last - held.start]
            rows = rows.reshape((1,) * stacked + rows.shape)
            blocks.append(
                replace(
                    entry,
                    key=stored_key,
                    data=rows,
                    dtype=rows.dtype,
                    local_shape=tuple(rows.shape),
                    global_offset=tuple(offset),
                    axis_fragmentations=None,  # blocks are of uneven size, for which megatron takes no stacked axes
                    prepend_axis_num=0,
                    replica_id=(*entry.replica_id[:-1], 0),  # no data-parallel rank has another's rows
                )
            )
        return blocks


def _blocks(entry: Any) -> list[Any]:
    """The ShardedTensors that `entry`, one or a factory of them, stands for."""
    state = {"": entry}
    apply_factories(state)
    return list(nested_values(state))


def _piece(block: Any, parameter: torch.Tensor) -> _Piece:
    row = max(1, parameter[0].numel())
    data = block.data.detach()
    assert data.is_contiguous()
    assert data.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
    return _Piece((data.storage_offset() - parameter.storage_offset()) // row, block.without_data())


def _held(rows: int, ranks: int, rank: int) -> _Held:
    """How torch cuts: ceil(rows / ranks) to each, until there are none left."""
    each = -(-rows // ranks)
    return _Held(min(rank * each, rows), min((rank + 1) * each, rows))
