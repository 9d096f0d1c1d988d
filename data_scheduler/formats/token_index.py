"""Where the documents of a token file begin: Megatron's `.idx` and datatrove's `.ds.index`."""

import os
import struct
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_scheduler.paths import open_binary

MAGIC = b"MMIDIDX\x00\x00"
HEADER_BYTES = 34
MEGATRON_TYPES: dict[int, Any] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
DATATROVE_TYPES: dict[int, Any] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}
STRETCH_TOKENS = 1 << 20


class TokenIndex(NamedTuple):
    """Documents of a token file; document i has `lengths[i]` tokens from byte `offsets[i]` on."""

    dtype: np.dtype[Any]
    offsets: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]


def read_index(path: str, kind: str, size: int) -> TokenIndex:
    """The index beside a `megatron` or `ds` file of `size` bytes. Raises OSError when there is none, ValueError when it
    is not one."""
    return _megatron(path) if kind == "megatron" else _datatrove(path, size)


def stretches(index: TokenIndex) -> list[tuple[int, int]]:
    """(documents, bytes) of stretches of about STRETCH_TOKENS tokens."""
    edges = np.flatnonzero(np.diff(np.cumsum(index.lengths) // STRETCH_TOKENS)) + 1
    return [
        (len(lengths), int(lengths.sum()) * index.dtype.itemsize)
        for lengths in np.split(index.lengths, edges)
        if len(lengths)
    ]


def _megatron(path: str) -> TokenIndex:
    with open_binary(os.path.splitext(path)[0] + ".idx") as file:
        data = file.read()
    if not data.startswith(MAGIC) or len(data) < HEADER_BYTES:
        raise ValueError("the .idx beside it is not a Megatron index")
    version, code, sequences, _ = struct.unpack_from("<QBQQ", data, len(MAGIC))
    if version != 1 or code not in MEGATRON_TYPES:
        raise ValueError(f"Megatron index of version {version}, type code {code}; version 1 is known")
    if len(data) < HEADER_BYTES + 12 * sequences:
        raise ValueError("the .idx beside it is cut off")
    lengths = np.frombuffer(data, "<i4", sequences, HEADER_BYTES).astype(np.int64)
    offsets = np.frombuffer(data, "<i8", sequences, HEADER_BYTES + 4 * sequences)
    return TokenIndex(np.dtype(MEGATRON_TYPES[code]), offsets, _checked(lengths))


def _datatrove(path: str, size: int) -> TokenIndex:
    with open_binary(path + ".index") as file:
        data = file.read()
    if len(data) % 8:
        raise ValueError("the .ds.index beside it is cut off")
    ends = np.frombuffer(data, "<u8").astype(np.int64)
    tokens = int(ends[-1]) if len(ends) else 0
    width = _token_bytes(path)
    if width is None:
        # Files of several tasks have no .metadata before they are merged, but the index counts the tokens.
        width = size // tokens if tokens > 0 else 2
        if width not in DATATROVE_TYPES or width * tokens != size:
            raise ValueError(f"no .ds.metadata beside it, and {size} bytes are not {tokens} tokens of 2 or 4 bytes")
    lengths = np.diff(ends, prepend=0)
    return TokenIndex(np.dtype(DATATROVE_TYPES[width]), (ends - lengths) * width, _checked(lengths))


def _token_bytes(path: str) -> int | None:
    """Bytes of a token as `.ds.metadata` says, which begins with `tokenizer|bytes`; None when there is none."""
    try:
        with open_binary(path + ".metadata") as file:
            first = file.readline(1 << 16)
    except FileNotFoundError:
        return None
    width = first.rpartition(b"|")[2].strip()
    if width not in (b"2", b"4"):
        raise ValueError("the .ds.metadata beside it does not say 2 or 4 bytes a token")
    return int(width)


def _checked(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    if len(lengths) and int(lengths.min()) < 0:
        raise ValueError("the index beside it has a document of negative length")
    return lengths
