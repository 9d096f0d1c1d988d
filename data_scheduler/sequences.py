"""The inner loops: what is done for every sequence of every step.

Each function is written here in numpy, which is its definition, and once more in C (`csrc/loader/sequences.c`), which
is used where it was compiled (`native.py`). `tests/data_scheduler/test_sequences.py` holds the two against each other.
"""

from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from data_scheduler.native import LOOPS
from data_scheduler.order import Int64

Int32 = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]
AnyTokens = npt.NDArray[Any]
"""uint16 for vocabularies up to 65,536, else uint32"""


_native = LOOPS
NATIVE = _native is not None
"""Whether the compiled functions are used."""


def cut(
    tokens: AnyTokens, begins: Int64, ids: Int64, offsets: Int64, at: int, place: int, out: Int64 | AnyTokens
) -> tuple[Int32, Int64, Int64, int, int]:
    """Copy tokens [at, at + len(out)) to `out` and say which pieces they are of.

    Returns (starts, ids, offsets, next place, next token).

    tokens: uint16 or uint32[n]; begins: int64[pieces], ascending, where each piece begins in `tokens`, the first at 0;
    ids: int64[pieces], its document; offsets: int64[pieces], the token of its document that it begins with; place: the
    piece that token `at` is in; out: int64[count], or of the tokens' dtype, count >= 1. Of the results, starts
    int32[k] is where each piece begins in `out`, the first at 0; pieces without a token are left out. The next place
    is that of token at + count, the next token its number in the document. Raises ValueError when the tokens are not
    there.
    """
    if _native is None:
        return cut_in_numpy(tokens, begins, ids, offsets, at, place, out)
    starts, own, first, after, token = _native.cut(tokens, begins, ids, offsets, at, place, out)
    return np.frombuffer(starts, np.int32), np.frombuffer(own, np.int64), np.frombuffer(first, np.int64), after, token


def cut_in_numpy(
    tokens: AnyTokens, begins: Int64, ids: Int64, offsets: Int64, at: int, place: int, out: Int64 | AnyTokens
) -> tuple[Int32, Int64, Int64, int, int]:
    """`cut`, its definition."""
    stop = at + len(out)
    if not (0 <= at < stop <= len(tokens) and 0 <= place < len(begins) and begins[place] <= at):
        raise ValueError("cut: outside of the stretch")
    out[:] = tokens[at:stop]
    first = int(np.searchsorted(begins, at, side="right")) - 1
    last = int(np.searchsorted(begins, stop, side="left"))
    own = begins[first:last]
    kept = np.append(own[1:] > own[:-1], True)
    from_here = np.maximum(own, at)[kept]
    after = int(np.searchsorted(begins, stop, side="right")) - 1
    return (
        (from_here - at).astype(np.int32),
        ids[first:last][kept],
        offsets[first:last][kept] + (from_here - own[kept]),
        after,
        int(offsets[after] + stop - begins[after]),
    )


def join(rows: list[AnyTokens], before: AnyTokens, after: AnyTokens, dtype: npt.DTypeLike) -> tuple[AnyTokens, Int64]:
    """The rows one after the other, each between `before` and `after`: (tokens, where each begins).

    rows: uint16 or uint32[...] each, as are before and after; tokens: [total] of `dtype`, uint16 or uint32, which holds
    every one of them; begins: int64[rows].
    """
    if _native is None:
        return join_in_numpy(rows, before, after, dtype)
    tokens, begins = _native.join(rows, before, after, np.dtype(dtype).itemsize)
    return np.frombuffer(tokens, dtype), np.frombuffer(begins, np.int64)


def join_in_numpy(
    rows: list[AnyTokens], before: AnyTokens, after: AnyTokens, dtype: npt.DTypeLike
) -> tuple[AnyTokens, Int64]:
    """`join`, its definition."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows)) + (len(before) + len(after))
    parts = chain.from_iterable((before, row, after) for row in rows)
    tokens: AnyTokens = np.concatenate([before[:0], *parts], dtype=dtype, casting="unsafe")
    return tokens, np.cumsum(lengths) - lengths


def layout(starts: list[Int32], ids: list[Int64], width: int) -> tuple[Int32, Int64, Int64, BoolArray]:
    """What a model needs to know of rows of `width` tokens: (cu_seqlens, document ids, position ids, mask).

    starts, ids: per row, int32 and int64[segments]: where each document begins, ascending from 0, and which it is.
    cu_seqlens: int32[documents + 1], over the flattened inputs [rows · (width − 1)]; document ids: int64[documents];
    position ids: int64[rows, width − 1], from 0 at each document's first token in its row; mask: bool[rows, width − 1],
    False where the next token is another document's. A document that begins at a row's last token is none of the
    inputs. Raises ValueError when the starts do not ascend from 0.
    """
    if _native is None:
        return layout_in_numpy(starts, ids, width)
    positions = np.empty((len(starts), width - 1), np.int64)
    mask = np.empty((len(starts), width - 1), np.bool_)
    edges, documents = _native.layout(starts, ids, width, positions, mask)
    return np.frombuffer(edges, np.int32), np.frombuffer(documents, np.int64), positions, mask


def layout_in_numpy(starts: list[Int32], ids: list[Int64], width: int) -> tuple[Int32, Int64, Int64, BoolArray]:
    """`layout`, its definition."""
    rows = len(starts)
    for number, (row, own) in enumerate(zip(starts, ids, strict=True)):
        if not len(row) or len(own) != len(row) or row[0] != 0 or row[-1] >= width or (np.diff(row) <= 0).any():
            raise ValueError(f"layout: the segments of row {number} do not ascend from 0")
    within = np.concatenate(starts).astype(np.int64)
    begins = within + np.repeat(np.arange(rows), [len(row) for row in starts]) * width
    mask = np.ones((rows, width), np.bool_)  # of each token as a prediction; a row's first is none
    mask.reshape(-1)[begins] = False
    seen = within < width - 1
    inputs = begins[seen] - begins[seen] // width
    edges = np.append(inputs, rows * (width - 1))
    positions = np.arange(rows * (width - 1)) - np.repeat(edges[:-1], np.diff(edges))
    documents: Int64 = np.concatenate(ids)[seen]
    return edges.astype(np.int32), documents, positions.reshape(rows, width - 1), mask[:, 1:]


def count(places: Int64, rows: Int32, positions: Int32, given: Int64, width: int) -> None:
    """Note new positions and what was given.

    positions: int32[places, n] and given: int64[places, 2], both changed: row i of `rows` int32[k, n] becomes that of
    places[i] of `places` int64[k], in order, and `given` there grows by one sequence of `width` tokens. Where places[i]
    is negative the position of place ~places[i] is noted and nothing counted. Raises ValueError for shapes that do not
    fit.
    """
    if _native is None:
        count_in_numpy(places, rows, positions, given, width)
    else:
        _native.count(places, rows, positions, given, width)


def count_in_numpy(places: Int64, rows: Int32, positions: Int32, given: Int64, width: int) -> None:
    """`count`, its definition."""
    own = np.where(places < 0, ~places, places)
    if rows.shape != (len(places), positions.shape[1]) or len(positions) != len(given) or (own >= len(given)).any():
        raise ValueError("count: shapes do not fit")
    for place, row in zip(own.tolist(), rows, strict=True):
        positions[place] = row  # of a place that is there twice the last position stays
    np.add.at(given, places[places >= 0], (1, width))
