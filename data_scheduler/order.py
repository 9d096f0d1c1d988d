"""Permutations and the dealing of chunks to lanes: pure functions of a seed and plain numbers.

Everything here must give the same answer on every machine and numpy version. `Generator.permutation` makes no such
promise (NEP 19); the raw stream of a BitGenerator does, so permutations are a stable argsort of raw 64-bit draws.

    >>> permutation(5, 0, "demo").tolist()
    [4, 2, 1, 0, 3]
    >>> deal(np.array([4, 4, 4, 4, 2]), np.arange(5), np.arange(2))
    [array([0, 2, 4]), array([1, 3])]
"""

import hashlib
import heapq
import itertools
import math
import struct
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from data_scheduler.native import LOOPS

Int64 = npt.NDArray[np.int64]


MANY = 1024
"""Numbers from which another look at them costs less than the time a faster sort saves."""
GOLDEN = 11400714819323198485
"""2⁶⁴ over the golden ratio; its multiples spread evenly over 64 bits."""


def draws(size: int, *key: int | str) -> npt.NDArray[np.uint64]:
    """uint64[size] random numbers named by `key`: the Philox stream of its hash, independent of that of other keys."""
    digest = _named(key)
    # Setting the state of a generator that is there costs 2 µs, making one 12 to 20; from arrays instead of tuples 3.
    generator: np.random.Philox | None = getattr(_generators, "philox", None)
    if generator is None:
        generator = _generators.philox = np.random.Philox(key=0)
    state: Any = {
        "bit_generator": "Philox",
        "state": {"counter": _ZERO, "key": _TWO_NUMBERS.unpack(digest)},
        "buffer": _ZERO,
        "buffer_pos": 4,
        "has_uint32": 0,
        "uinteger": 0,
    }
    generator.state = state
    numbers: npt.NDArray[np.uint64] = generator.random_raw(size)
    return numbers


_generators = threading.local()
_ZERO = (0, 0, 0, 0)
_TWO_NUMBERS = struct.Struct("<2Q")


def _named(key: tuple[int | str, ...]) -> bytes:
    return hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=16).digest()


def permutation(size: int, *key: int | str) -> Int64:
    """A permutation of range(size), int64[size], fixed by `key`."""
    if size < 2:
        return np.zeros(size, dtype=np.int64)
    if LOOPS is not None and size < MANY:
        return np.frombuffer(LOOPS.shuffle(_named(key), size), np.int64)
    return permutation_in_numpy(size, *key)


def permutation_in_numpy(size: int, *key: int | str) -> Int64:
    """`permutation`, its definition: the stable order of as many numbers of the key's stream."""
    numbers = draws(size, *key)
    if size >= MANY:
        # Twice as fast as a stable sort, and the same unless two draws are equal, which 64 bits seldom are.
        order = numbers.argsort().astype(np.int64, copy=False)
        drawn = numbers[order]
        if (drawn[1:] != drawn[:-1]).all():
            return order
    return numbers.argsort(kind="stable").astype(np.int64, copy=False)


def lanes_of(first: int, batch: int, lanes: int) -> Int64:
    """The lane of each of the sequences [first, first + batch) of a run, int64[batch].

    In every round of `lanes` sequences each lane gives one. Lanes are taken in blocks of u = gcd(batch, lanes), and
    each round begins with another block: round r with block floor(n·frac(r/φ)) of the n = lanes/u. Without that a
    source that is drawn every tenth step would meet the same lanes for ever, where ten divides the steps of a round.

    Where the batch changes within a round, so does u, and a few lanes come twice in it or not at all: after thirty
    changes lanes were at most 8 sequences apart, of 200 that each gave.

    A data-parallel size divides batch and lanes, hence u: sequence g is always a lane's of rank g mod size.

        >>> lanes_of(0, 4, 8).tolist(), lanes_of(4, 4, 8).tolist(), lanes_of(8, 4, 8).tolist()
        ([0, 1, 2, 3], [4, 5, 6, 7], [4, 5, 6, 7])
    """
    unit = math.gcd(batch, lanes)
    taken, at, end = [], first, first + batch
    while at < end:
        number, place = divmod(at, lanes)
        next_round = min(end, at - place + lanes)
        # A round takes its blocks in a circle, so its lanes too are consecutive numbers, from where it begins on. Upper
        # 32 bits of 64-bit multiples of 2⁶⁴/φ, times n, shifted, are floor(n · frac(r/φ)) in integers.
        begun = ((number * GOLDEN % (1 << 64) >> 32) * (lanes // unit) >> 32) * unit + place
        taken.append(np.arange(begun, begun + next_round - at, dtype=np.int64) % lanes)
        at = next_round
    return taken[0] if len(taken) == 1 else np.concatenate(taken)


def deal(sizes: Int64, order: Int64, lanes: Int64) -> list[Int64]:
    """Deal chunks to lanes: in the given order, each to the lane with the least bytes so far.

    sizes: int64[chunks], bytes; order: int64[chunks], a permutation; lanes: int64[lanes], a permutation that settles
    ties, so that where lanes outnumber chunks each epoch serves others. Returns one int64 array of chunk numbers per
    lane. A chunk goes to the emptiest lane, so no two lanes ever differ by more than the largest chunk.
    """
    shift = len(lanes).bit_length()
    # Load and turn in one number: compared in a third of the time that pairs take, and no two are equal.
    loads = list(range(len(lanes)))
    replace = heapq.heapreplace
    emptiest = [replace(loads, loads[0] + size) for size in (sizes[order] << shift).tolist()]
    seats = lanes[np.array(emptiest, np.int64) & ((1 << shift) - 1)]
    dealt = order[np.argsort(seats, kind="stable")]
    edges = np.cumsum(np.bincount(seats, minlength=len(lanes))).tolist()
    return [dealt[start:stop] for start, stop in itertools.pairwise([0, *edges])]
