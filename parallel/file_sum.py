"""Size and SHA-256 of a file; loads neither torch nor megatron, so that small processes can use it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FileSum:
    """What a file must be like."""

    size: int
    """Bytes."""
    sha256: str


def file_sum(path: Path) -> FileSum:
    """Size and SHA-256 of a file; raises OSError."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileSum(file.tell(), digest.hexdigest())
