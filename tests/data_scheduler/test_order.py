import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_scheduler import order as order_module
from data_scheduler.native import LOOPS
from data_scheduler.order import MANY, deal, draws, permutation, permutation_in_numpy


@given(st.integers(0, 500), st.integers(0, 2**63), st.text(max_size=10))
def test_permutation_holds_each_number_once(size: int, seed: int, name: str) -> None:
    assert sorted(permutation(size, seed, name).tolist()) == list(range(size))


def test_permutation_is_fixed_for_all_time() -> None:
    # Written down, not computed: a run of last year must replay on next year's numpy.
    assert permutation(8, 0, "chunks", "web", 0).tolist() == [2, 4, 7, 6, 5, 3, 0, 1]
    assert permutation(8, 1, "chunks", "web", 0).tolist() == [2, 7, 3, 6, 5, 4, 1, 0]


@pytest.mark.parametrize("size", [MANY - 1, MANY, 5000])
@pytest.mark.parametrize("different", [3, 1 << 60])
def test_equal_draws_stay_in_their_order(monkeypatch: pytest.MonkeyPatch, size: int, different: int) -> None:
    numbers = draws(size, "some") % np.uint64(different)
    monkeypatch.setattr(order_module, "draws", lambda size, *key: numbers)
    assert permutation_in_numpy(size).tolist() == sorted(range(size), key=numbers.tolist().__getitem__)


@pytest.mark.skipif(LOOPS is None, reason="the loops of csrc/loader/ are not compiled here")
@given(st.integers(0, MANY + 2), st.lists(st.one_of(st.integers(0, 1 << 64), st.text(max_size=9)), max_size=4))
def test_permutation_is_its_definition(size: int, key: list[int | str]) -> None:
    found = permutation(size, *key)
    assert found.dtype == np.int64
    assert found.tolist() == permutation_in_numpy(size, *key).tolist()


def test_different_keys_give_different_orders() -> None:
    keys = [(seed, name, epoch) for seed in range(3) for name in ("a", "b") for epoch in range(3)]
    orders = {tuple(permutation(50, *key).tolist()) for key in keys}
    assert len(orders) == len(keys)


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=200), st.integers(1, 40), st.integers(0, 99))
def test_dealing_gives_each_chunk_once_and_balances_within_one_chunk(sizes: list[int], lanes: int, seed: int) -> None:
    array = np.array(sizes)
    hands = deal(array, permutation(len(sizes), seed), permutation(lanes, seed, "lanes"))
    assert sorted(np.concatenate(hands).tolist()) == list(range(len(sizes)))
    loads = [int(array[hand].sum()) for hand in hands]
    assert max(loads) - min(loads) <= max(sizes)


@given(st.integers(0, 40), st.lists(st.one_of(st.integers(-5, 1 << 70), st.text(max_size=5)), max_size=4))
def test_draws_are_the_philox_stream_of_the_keys_hash(size: int, key: list[int | str]) -> None:
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=16).digest()
    assert (draws(size, *key) == np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(size)).all()


@given(st.lists(st.integers(0, 9), max_size=200), st.integers(1, 40), st.integers(0, 99), st.sampled_from([1, 1 << 30]))
def test_each_chunk_goes_to_the_emptiest_lane(sizes: list[int], lanes: int, seed: int, scale: int) -> None:
    array = np.array(sizes, np.int64) * scale
    order, seats = permutation(len(sizes), seed), permutation(lanes, seed, "lanes")
    hands: list[list[int]] = [[] for _ in range(lanes)]
    loads = [0] * lanes
    for chunk in order.tolist():
        turn = loads.index(min(loads))
        hands[int(seats[turn])].append(chunk)
        loads[turn] += int(array[chunk])
    assert [hand.tolist() for hand in deal(array, order, seats)] == hands
