"""Data that was tokenized before: `.npy` arrays and Megatron's `.bin` + `.idx`.

`.npy`: one integer array; documents end with the tokenizer's end-of-document token (an unfinished last one counts).
`.bin`: token ids of all documents, `.idx` beside it says where they begin (Megatron-LM's indexed datasets, version 1).

A document's own end-of-document token is taken off; the scheduler puts one after every document.
"""

import itertools
import os
import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from data_scheduler.formats.records import Records, Unit

MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_TYPES: dict[int, Any] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


class Index:
    """Megatron's `.idx`: lengths and byte offsets of the sequences in the `.bin`."""

    def __init__(self, path: str) -> None:
        """Raises OSError when there is none, ValueError when it is not one."""
        with open(os.path.splitext(path)[0] + ".idx", "rb") as file:
            data = file.read()
        if not data.startswith(MAGIC) or len(data) < 34:
            raise ValueError("the .idx beside it is not a Megatron index")
        version, code, sequences, _ = struct.unpack_from("<QBQQ", data, 9)
        if version != 1 or code not in MEGATRON_TYPES:
            raise ValueError(f"Megatron index of version {version}, type code {code}; version 1 is known")
        if len(data) < 34 + 12 * sequences:
            raise ValueError("the .idx beside it is cut off")
        self.dtype = np.dtype(MEGATRON_TYPES[code])
        self.lengths = np.frombuffer(data, np.int32, sequences, 34)
        self.offsets = np.frombuffer(data, np.int64, sequences, 34 + 4 * sequences)


STRETCH_TOKENS = 1 << 20


def megatron_layout(path: str) -> list[tuple[int, int]]:
    """(documents, bytes) of stretches of about STRETCH_TOKENS tokens. Raises OSError or ValueError."""
    index = Index(path)
    edges = np.flatnonzero(np.diff(np.cumsum(index.lengths, dtype=np.int64) // STRETCH_TOKENS)) + 1
    return [
        (len(lengths), int(lengths.sum()) * index.dtype.itemsize)
        for lengths in np.split(index.lengths, edges)
        if len(lengths)
    ]


def read_megatron(unit: Unit, eos_id: int, vocab_size: int) -> Records:
    """Sequences [start, stop) of a `.bin` file. Raises OSError when a file is gone."""
    records = Records()
    try:
        index = Index(unit.path)
    except ValueError as error:
        records.reject(str(error))
        return records
    size = os.path.getsize(unit.path) // index.dtype.itemsize
    tokens = np.memmap(unit.path, index.dtype, "r") if size else np.empty(0, index.dtype)
    stop = len(index.lengths) if unit.stop < 0 else unit.stop
    for number in range(unit.start, stop):
        begin = int(index.offsets[number]) // index.dtype.itemsize
        end = begin + int(index.lengths[number])
        if not 0 <= begin <= end <= size:
            records.reject("the index points past the end of the .bin file")
            continue
        _add(np.array(tokens[begin:end]), eos_id, vocab_size, records)
    return records


def read_npy(unit: Unit, eos_id: int, vocab_size: int) -> Records:
    """The documents of an array. Raises OSError when the file is gone."""
    records = Records()
    try:
        tokens = np.load(unit.path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        records.reject(f"not a .npy array: {error}")
        return records
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        records.reject(f"an array of {tokens.dtype} with {tokens.ndim} dimensions; token ids are integers in one")
        return records
    ends = np.flatnonzero(tokens == eos_id) + 1
    edges = np.concatenate([[0], ends, [len(tokens)] if not len(ends) or ends[-1] != len(tokens) else []]).astype(int)
    for begin, end in itertools.pairwise(edges):
        _add(np.array(tokens[begin:end]), eos_id, vocab_size, records)
    return records


def _add(tokens: npt.NDArray[Any], eos_id: int, vocab_size: int, records: Records) -> None:
    if len(tokens) and tokens[-1] == eos_id:
        tokens = tokens[:-1]
    if len(tokens) and (int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size):
        records.reject(f"token id {int(tokens.max())} is outside the tokenizer's vocabulary of {vocab_size}")
        return
    records.size += 4 * len(tokens)
    records.documents.append(tokens.astype(np.uint32))
