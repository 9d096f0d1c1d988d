"""Weights in a Hugging Face folder: `model.safetensors`, or several files and an index."""

import json
import math
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from headrace.errors import CheckpointError
from pretrain.convert.tensors import Part, check_finite

SHARD_BYTES = 5_000_000_000
"""Largest file, the size Hugging Face's own tools cut at."""
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types of weights, as safetensors calls them."""
OTHER_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""Types that quantized folders hold: they can be looked at, not converted."""


class SafetensorsReader:
    """The tensors of a folder by name. Raises CheckpointError when a file is missing or is not what it should be."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        """Tensor name -> open file."""
        self._places: dict[str, Place] = {}
        for file, names in self._listed().items():
            opened = self._open(file)
            stored = opened.keys()
            missing = names - set(stored)
            if missing:
                raise CheckpointError(f"{folder / file}: holds no {min(missing)}, though {INDEX} says so")
            self._files |= dict.fromkeys(names or stored, opened)
            places = _places(folder / file)
            # A file may hold more than the index takes from it: old copies of what lies in another.
            self._places |= {name: places[name] for name in names or stored}

    def check(self, parts: Iterable[Part], ignored: Iterable[str] = ()) -> None:
        """Raise CheckpointError unless the folder holds just `parts`, in their shapes, besides the names `ignored`."""
        expected = {part.name: part.shape for part in parts}
        for name, shape in expected.items():
            if name not in self._files:
                raise CheckpointError(f"{self.folder}: tensor {name} is missing")
            found = tuple(self._files[name].get_slice(name).get_shape())
            if found != shape:
                raise CheckpointError(f"{self.folder}: tensor {name} has shape {found}, config.json makes it {shape}")
        unknown = sorted(set(self._files) - set(expected) - set(ignored))
        # Rotary frequencies, which old versions of transformers stored, follow from config.json.
        unknown = [name for name in unknown if not name.endswith("rotary_emb.inv_freq")]
        if unknown:
            raise CheckpointError(f"{self.folder}: tensor {unknown[0]} has no place in the model")

    def dtype(self, parts: Iterable[Part]) -> torch.dtype:
        """A type that holds all `parts` exactly: bfloat16 when all are, float32 otherwise. Raises CheckpointError."""
        found = {self._files[part.name].get_slice(part.name).get_dtype() for part in parts}
        if not found <= DTYPES.keys():
            raise CheckpointError(
                f"{self.folder}: weights of type {', '.join(sorted(found))}; F32, F16 and BF16 are supported"
            )
        return torch.bfloat16 if found == {"BF16"} else torch.float32

    def names(self) -> list[str]:
        """Of all tensors, sorted."""
        return sorted(self._files)

    def read(self, name: str, finite: bool = True) -> torch.Tensor:
        """The tensor called `name`, on the CPU. Raises CheckpointError when it is of a type that torch does not have,
        or should be `finite` and is not."""
        path, (begin, end), kind, shape = self._places[name]
        dtype = (DTYPES | OTHER_DTYPES).get(kind)
        if dtype is None:
            raise CheckpointError(f"{path}: tensor {name} is of type {kind}, which cannot be read")
        # Not through safetensors, which maps the whole file: its pages count as ours, and a folder as big as memory
        # would push everything else out.
        raw = torch.from_numpy(np.fromfile(path, np.uint8, end - begin, offset=begin))
        tensor = raw.view(dtype).view(shape)
        if finite:
            check_finite(tensor, f"{path}: tensor {name}")
        return tensor

    def _listed(self) -> dict[str, set[str]]:
        """File -> names of its tensors that are wanted; an empty set stands for all of them."""
        if (self.folder / SINGLE).is_file():
            return {SINGLE: set()}
        try:
            weight_map = json.loads((self.folder / INDEX).read_text("utf-8"))["weight_map"]
            files: dict[str, set[str]] = {}
            for name, file in weight_map.items():
                files.setdefault(Path(file).name, set()).add(name)
            return files
        except FileNotFoundError:
            raise CheckpointError(
                f"{self.folder}: no {SINGLE} and no {INDEX}; weights in other formats are converted by loading and "
                "saving them with transformers (save_pretrained)"
            ) from None
        except (ValueError, KeyError, AttributeError, TypeError):
            raise CheckpointError(f"{self.folder / INDEX}: not an index of safetensors files") from None

    def _open(self, file: str) -> Any:
        path = self.folder / file
        try:
            return safe_open(path, framework="pt")
        except FileNotFoundError:
            raise CheckpointError(f"{path}: missing, though {INDEX} names it; download the model again") from None
        except SafetensorError as error:
            raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from None


class SafetensorsWriter:
    """Writes tensors of one type into as few files of at most `shard_bytes` as their order allows.

    Names and shapes are given first, so that headers can be written; tensors then go to disk one by one.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Sequence[tuple[str, tuple[int, ...]]],
        dtype: torch.dtype,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self._folder, self._dtype = folder, dtype
        self._shapes = dict(tensors)
        self._files: list[list[str]] = []
        room = 0
        for name, _ in tensors:
            size = self._size(name)
            if not self._files or room < size:
                self._files.append([])
                room = shard_bytes
            self._files[-1].append(name)
            room -= size
        self._waiting = [name for name, _ in reversed(tensors)]
        self._begins = {names[0]: number for number, names in enumerate(self._files)}
        self._open: BinaryIO | None = None

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a contiguous CPU tensor; they come in the order in which they were announced. Raises OSError."""
        assert self._waiting.pop() == name
        assert (tuple(tensor.shape), tensor.dtype) == (self._shapes[name], self._dtype), name
        if name in self._begins:
            self._begin(self._begins[name])
        assert self._open is not None
        tensor.reshape(-1).view(torch.uint8).numpy().tofile(self._open)

    def close(self) -> None:
        """Finish the last file, and write the index where there are several. Raises OSError."""
        assert not self._waiting
        if self._open is not None:
            self._open.close()
        if len(self._files) == 1:
            return
        weight_map = {name: self._name(number) for number, names in enumerate(self._files) for name in names}
        index = {"metadata": {"total_size": sum(map(self._size, self._shapes))}, "weight_map": weight_map}
        (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")

    def _begin(self, number: int) -> None:
        if self._open is not None:
            self._open.close()
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        kind = next(key for key, dtype in DTYPES.items() if dtype == self._dtype)
        at = 0
        for name in self._files[number]:
            end = at + self._size(name)
            header[name] = {"dtype": kind, "shape": self._shapes[name], "data_offsets": [at, end]}
            at = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # data begins at a multiple of 8, as the format wants it
        self._open = (self._folder / self._name(number)).open("wb")
        self._open.write(struct.pack("<Q", len(text)) + text)
        self._open.flush()  # before numpy writes to the same file

    def _size(self, name: str) -> int:
        return math.prod(self._shapes[name]) * self._dtype.itemsize

    def _name(self, number: int) -> str:
        count = len(self._files)
        return SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


Place = tuple[Path, tuple[int, int], str, list[int]]
"""File, bytes from and to, type, shape."""


def _places(path: Path) -> dict[str, Place]:
    """Where each tensor of a file lies; safetensors has found the file whole."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: (
            path,
            (8 + length + entry["data_offsets"][0], 8 + length + entry["data_offsets"][1]),
            entry["dtype"],
            entry["shape"],
        )
        for name, entry in header.items()
    }
