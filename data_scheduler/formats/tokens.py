"""Data that was tokenized before: `.npy` arrays, Megatron's `.bin` + `.idx`, datatrove's `.ds` + `.ds.index`.

`.npy`: one integer array; documents end with the tokenizer's end-of-document token (an unfinished last one counts).
`.bin` and `.ds`: token ids of all documents; a file beside it says where they begin (`token_index.py`).

A document's own end-of-document token is taken off; the scheduler puts one after every document.
"""

import itertools
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from data_scheduler.formats.records import Records, Unit
from data_scheduler.formats.token_index import TokenIndex
from headrace.errors import HeadraceError

UNSIGNED = (np.dtype(np.uint16), np.dtype(np.uint32))
"""Kept as they are; others are converted."""
GAP_BYTES = 1 << 20
"""Bytes between documents that are read and thrown away rather than skipped: a remote request costs as much."""


class Vocabulary(NamedTuple):
    """What a document of token ids is held against."""

    eos_id: int
    size: int


def read_indexed(file: IO[bytes], size: int, unit: Unit, index: TokenIndex, vocabulary: Vocabulary) -> Records:
    """Documents [start, stop) of a `.bin` or `.ds` file of `size` bytes. Raises OSError."""
    records = Records()
    chosen = slice(unit.start, None if unit.stop < 0 else unit.stop)
    offsets, lengths = index.offsets[chosen], index.lengths[chosen]
    # Compared as tokens left, so that a damaged length cannot overflow.
    inside = (offsets >= 0) & (offsets <= size) & (lengths <= (size - offsets) // index.dtype.itemsize)
    if int(lengths[inside].sum()) * index.dtype.itemsize > size:
        records.reject("the documents of the index overlap")
        return records
    parts = _parts(file, offsets[inside], lengths[inside] * index.dtype.itemsize)
    for fits in inside.tolist():
        if fits:
            _add(np.frombuffer(next(parts), index.dtype), vocabulary, records)
        else:
            records.reject("the index points past the end of the file")
    missing = 0 if unit.stop < 0 else unit.stop - unit.start - len(offsets)
    if missing > 0:
        records.reject(f"the index has {missing} documents fewer than when the source entered the run")
    return records


def read_npy(file: IO[bytes], vocabulary: Vocabulary) -> Records:
    """The documents of an array. Raises OSError."""
    records = Records()
    try:
        major, _ = npy.read_magic(file)
        shape, _, dtype = npy.read_array_header_1_0(file) if major == 1 else npy.read_array_header_2_0(file)
    except (OSError, HeadraceError):
        raise
    except Exception as error:  # the header is a Python literal, and numpy lets what its parser raises through
        records.reject(f"not a .npy array: {' '.join(str(error).split()) or type(error).__name__}")
        return records
    if len(shape) != 1 or dtype.kind not in "iu":
        records.reject(f"an array of {dtype} with {len(shape)} dimensions; token ids are integers in one")
        return records
    data = file.read()
    whole = len(data) // dtype.itemsize
    tokens = np.frombuffer(data, dtype, min(whole, max(0, int(shape[0]))))
    ends = np.flatnonzero(tokens == vocabulary.eos_id) + 1
    rest = [len(tokens)] if not len(ends) or ends[-1] != len(tokens) else []
    if len(tokens) < shape[0]:
        rest = []  # the document it breaks off in is not whole
    edges = np.concatenate([[0], ends, rest]).astype(np.int64)
    # Looked at together: two numpy calls for each of a million short documents would cost more than reading them.
    sound = not len(tokens) or (tokens.min() >= 0 and tokens.max() < vocabulary.size)
    for begin, end in itertools.pairwise(edges.tolist()):
        _add(tokens[begin:end], vocabulary, records, sound)
    if len(tokens) < shape[0]:
        records.reject(f"cut off: {len(tokens)} of {shape[0]} tokens; the documents up to there were read")
    elif len(data) > shape[0] * dtype.itemsize:
        records.reject(f"{len(data) - shape[0] * dtype.itemsize} bytes follow the array")
    return records


def _parts(file: IO[bytes], offsets: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> Iterator[memoryview]:
    """The bytes of every document, those that lie close together from one read. The parts are inside the file."""
    first = 0
    while first < len(offsets):
        begin = end = int(offsets[first])
        last = first
        while last < len(offsets) and -GAP_BYTES < int(offsets[last]) - end < GAP_BYTES and offsets[last] >= begin:
            end = max(end, int(offsets[last] + sizes[last]))
            last += 1
        file.seek(begin)
        data = memoryview(file.read(end - begin))
        for number in range(first, last):
            at = int(offsets[number]) - begin
            part = data[at : at + int(sizes[number])]
            if len(part) < int(sizes[number]):
                raise OSError(f"ends at byte {begin + len(data)}, should have {end}")
            yield part
        first = last


def _add(tokens: npt.NDArray[Any], vocabulary: Vocabulary, records: Records, sound: bool = False) -> None:
    """A document, unless it has ids that the vocabulary lacks (looked at already where they are `sound`)."""
    if len(tokens) and tokens[-1] == vocabulary.eos_id:
        tokens = tokens[:-1]
    if len(tokens) and not sound:
        least, most = int(tokens.min()), int(tokens.max())
        if least < 0 or most >= vocabulary.size:
            wrong = least if least < 0 else most
            records.reject(f"token id {wrong} is outside the tokenizer's vocabulary of {vocabulary.size}")
            return
    records.size += 4 * len(tokens)
    records.documents.append(tokens if tokens.dtype in UNSIGNED else tokens.astype(np.uint32))
