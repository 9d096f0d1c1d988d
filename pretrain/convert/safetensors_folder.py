"""Weights in a Hugging Face folder: `model.safetensors`, or several files and an index."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from headrace.errors import CheckpointError
from pretrain.convert.tensors import Part

SHARD_BYTES = 5_000_000_000
"""Largest file, the size Hugging Face's own tools cut at."""
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class SafetensorsReader:
    """The tensors of a folder by name. Raises CheckpointError when a file is missing or is not what it should be."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        """Tensor name -> open file."""
        for file, names in self._listed().items():
            opened = self._open(file)
            stored = opened.keys()
            missing = names - set(stored)
            if missing:
                raise CheckpointError(f"{folder / file}: holds no {min(missing)}, though {INDEX} says so")
            self._files |= dict.fromkeys(names or stored, opened)

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
        if not found <= {"F32", "F16", "BF16"}:
            raise CheckpointError(
                f"{self.folder}: weights of type {', '.join(sorted(found))}; F32, F16 and BF16 are supported"
            )
        return torch.bfloat16 if found == {"BF16"} else torch.float32

    def read(self, name: str) -> torch.Tensor:
        """The tensor called `name`, on the CPU."""
        tensor: torch.Tensor = self._files[name].get_tensor(name)
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
    """Writes tensors into as few files of at most `shard_bytes` as their order allows; holds one file in memory."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._shard_bytes = folder, shard_bytes
        self._files: list[list[str]] = []
        self._waiting: dict[str, torch.Tensor] = {}
        self._waiting_bytes = self._total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take up a contiguous CPU tensor that shares no memory with another. Raises CheckpointError."""
        if self._waiting and self._waiting_bytes + tensor.nbytes > self._shard_bytes:
            self._flush()
        self._waiting[name] = tensor
        self._waiting_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def close(self) -> None:
        """Write what is left, and give the files the names that readers look for."""
        self._flush()
        count = len(self._files)
        if count == 1:
            self._path(0).rename(self._folder / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._files):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._path(number).rename(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")

    def _flush(self) -> None:
        path = self._path(len(self._files))
        path.touch()
        mode = path.stat().st_mode
        try:
            save_file(self._waiting, path, metadata={"format": "pt"})
        except SafetensorError as error:  # also a full disk
            raise CheckpointError(f"{path}: not written: {error}") from None
        path.chmod(mode)  # safetensors 0.8 makes files that only their owner may read
        self._files.append(list(self._waiting))
        self._waiting, self._waiting_bytes = {}, 0

    def _path(self, number: int) -> Path:
        return self._folder / f"model-{number + 1:05d}.safetensors"
