"""A checkpoint's `.metadata`: which tensors there are and where their pieces lie.

torch writes it with pickle and reads it with `pickle.load`, which runs whatever a file tells it to. A checkpoint that
is converted may come from anybody, so here it is read with the classes it consists of, and no others.
"""

import pickle
from pathlib import Path
from typing import Any, Final

import torch
from torch.distributed.checkpoint.metadata import Metadata

from headrace.errors import CheckpointError

ALLOWED: Final = {
    "torch": {"Size", "device", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
}
"""Module -> names in it. None of them does anything but hold values."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # pathlib's classes moved to a module of that package in Python 3.13.
        if name not in ALLOWED.get(module.removesuffix("._local"), ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


def read_metadata(path: Path) -> Metadata:
    """The `.metadata` of the checkpoint folder `path`. Raises CheckpointError when it is missing, damaged or unsafe."""
    try:
        with (path / ".metadata").open("rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError("it is no Metadata")
        for info in metadata.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise pickle.UnpicklingError(f"it points out of its folder, to {info.relative_path}")
    except Exception as error:  # damaged pickles raise anything
        first = str(error).partition("\n")[0]
        raise CheckpointError(f"{path}: not a readable checkpoint: {type(error).__name__}: {first}") from None
    return metadata
