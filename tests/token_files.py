"""Files of token ids as Megatron-LM and datatrove write them."""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def write_megatron(stem: Path, documents: Sequence[Sequence[int]]) -> None:
    """`stem`.bin and `stem`.idx with 16-bit token ids; each document is one sequence."""
    lengths = np.array([len(document) for document in documents], "<i4")
    offsets = np.concatenate([[0], np.cumsum(lengths.astype("<i8") * 2)])[: len(lengths)].astype("<i8")
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, len(lengths), len(lengths) + 1)
    places = np.arange(len(lengths) + 1, dtype="<i8")
    stem.with_suffix(".idx").write_bytes(head + lengths.tobytes() + offsets.tobytes() + places.tobytes())
    stem.with_suffix(".bin").write_bytes(b"".join(np.array(document, "<u2").tobytes() for document in documents))


def write_ds(path: Path, documents: Sequence[Sequence[int]], width: int = 2, metadata: bool = True) -> None:
    """A `.ds` file, its index of document ends and, on demand, its metadata."""
    path.write_bytes(b"".join(np.array(document, f"<u{width}").tobytes() for document in documents))
    ends = np.cumsum([len(document) for document in documents], dtype="<u8")
    Path(f"{path}.index").write_bytes(ends.tobytes())
    if metadata:
        Path(f"{path}.metadata").write_text(f"some/tokenizer|{width}\n{int(ends[-1])}\n{int(ends[-1])} T")
