"""Looking at many files: the same answer in the same order, with threads and without."""

import threading
import time

import pytest

from data_scheduler.listing import BATCH, SLOW_S, looked_at


@pytest.mark.parametrize("slow_from", [0, BATCH, 2 * BATCH, None])
def test_threads_take_over_where_it_is_slow(slow_from: int | None) -> None:
    items = list(range(3 * BATCH + 17))
    threads: dict[int, int] = {}

    def look(batch: list[int]) -> list[int]:
        threads[batch[0]] = threading.get_ident()
        if slow_from is not None and batch[0] >= slow_from:
            time.sleep(2 * SLOW_S * len(batch))
        return [-item for item in batch]

    assert list(looked_at(look, items)) == [-item for item in items]
    elsewhere = [first for first, thread in threads.items() if thread != threading.get_ident()]
    if slow_from is not None:
        assert all(first in elsewhere for first in range(slow_from + BATCH, len(items), BATCH))
