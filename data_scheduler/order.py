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
import threading

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]


def draws(size: int, *key: int | str) -> npt.NDArray[np.uint64]:
    """uint64[size] random numbers named by `key`: the Philox stream of its hash, independent of that of other keys."""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=16).digest()
    # Setting the state of a generator that is there costs 2 µs, making one 12 to 20.
    generator: np.random.Philox | None = getattr(_generators, "philox", None)
    if generator is None:
        generator = _generators.philox = np.random.Philox(key=0)
    generator.state = {
        "bit_generator": "Philox",
        "state": {"counter": _ZERO, "key": np.frombuffer(digest, dtype="<u8").astype(np.uint64)},
        "buffer": _ZERO,
        "buffer_pos": 4,
        "has_uint32": 0,
        "uinteger": 0,
    }
    numbers: npt.NDArray[np.uint64] = generator.random_raw(size)
    return numbers


_generators = threading.local()
_ZERO = np.zeros(4, np.uint64)


def permutation(size: int, *key: int | str) -> Int64:
    """A permutation of range(size), int64[size], fixed by `key`."""
    if size < 2:
        return np.zeros(size, dtype=np.int64)
    return np.argsort(draws(size, *key), kind="stable").astype(np.int64, copy=False)


def deal(sizes: Int64, order: Int64, lanes: Int64) -> list[Int64]:
    """Deal chunks to lanes: in the given order, each to the lane with the least bytes so far.

    sizes: int64[chunks], bytes; order: int64[chunks], a permutation; lanes: int64[lanes], a permutation that settles
    ties, so that where lanes outnumber chunks each epoch serves others. Returns one int64 array of chunk numbers per
    lane. A chunk goes to the emptiest lane, so no two lanes ever differ by more than the largest chunk.
    """
    hands: list[list[int]] = [[] for _ in lanes]
    loads = [(0, turn) for turn in range(len(lanes))]
    seats = lanes.tolist()
    for chunk, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        load, turn = loads[0]
        hands[seats[turn]].append(chunk)
        heapq.heapreplace(loads, (load + size, turn))
    return [np.array(hand, dtype=np.int64) for hand in hands]
