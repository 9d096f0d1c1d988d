"""What ranks tell each other when the first one takes its time, fails, or dies."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from process_group import run_ranks

from headrace.errors import ConfigError
from parallel import exchange, process_groups
from parallel.layout import Layout

TIMEOUT_S = 2.0
"""Of collectives."""


def slow_first_rank(seconds: float) -> list[str]:
    ranks = process_groups.initialize(Layout(2), seed=1, timeout_s=TIMEOUT_S)
    order: list[str] = []

    def act() -> str:
        if ranks.rank == 0:
            time.sleep(seconds)
        return f"made by {ranks.rank}"

    order.append(exchange.first_rank_first(act, ranks.rank))
    exchange.only_first_rank(lambda: time.sleep(seconds), ranks.rank)
    order.append(exchange.from_first_rank(act, ranks.rank))
    return order


@pytest.mark.multiprocess
def test_the_first_rank_may_take_longer_than_a_collective() -> None:
    assert run_ranks(2, slow_first_rank, 1.5 * TIMEOUT_S, timeout_s=120) == [
        ["made by 0", "made by 0"],
        ["made by 1", "made by 0"],
    ]


def failing_first_rank() -> list[str]:
    ranks = process_groups.initialize(Layout(2), seed=1, timeout_s=60)
    told = []

    def fail() -> None:
        raise ConfigError("not this one") if len(told) == 0 else FileNotFoundError(2, "no such file", "data")

    for _ in range(2):
        try:
            exchange.only_first_rank(fail, ranks.rank)
        except (ConfigError, OSError) as error:
            told.append(f"{type(error).__name__}: {error}")
    return told


@pytest.mark.multiprocess
def test_every_rank_raises_what_the_first_one_raised() -> None:
    one, other = run_ranks(2, failing_first_rank, timeout_s=120)
    assert one == other == ["ConfigError: not this one", "FileNotFoundError: [Errno 2] no such file: 'data'"]


DIES = """
import os, signal, sys, time
from parallel import exchange, process_groups
from parallel.layout import Layout
ranks = process_groups.initialize(Layout(2), seed=1)
print("joined", flush=True)
try:
    exchange.only_first_rank(lambda: time.sleep(600), ranks.rank)
except RuntimeError as error:
    sys.exit(4 if process_groups.is_lost_peer(error) else 1)
"""


@pytest.mark.multiprocess
def test_a_first_rank_that_dies_is_not_waited_for() -> None:
    """With a store in the first rank's process, as `env://` has it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    first, second = (
        subprocess.Popen([sys.executable, "-c", DIES], env=common | {"RANK": str(rank)}, stdout=subprocess.PIPE)
        for rank in range(2)
    )
    for process in (first, second):
        assert process.stdout is not None
        assert process.stdout.readline() == b"joined\n"
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert second.wait(timeout=120) == 4
