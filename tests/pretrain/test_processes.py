"""start_processes with real processes and real kills. The tests run it in a process of its own, to signal that one."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from headrace.errors import ConfigError
from pretrain.processes import start_processes

CHILD_HEAD = """
import os, signal, sys, time
from pathlib import Path
rank, here = int(os.environ["RANK"]), Path(sys.argv[1])
signal.alarm(60)  # whatever goes wrong, no child waits for ever
(here / f"pid-{rank}").write_text(str(os.getpid()))
def wait_for(*names):
    while not all((here / name).exists() for name in names):
        time.sleep(0.01)
def touch(name):
    (here / name).touch()
def wait_until_reaped(rank):
    while not (here / f"pid-{rank}").exists() or not (here / f"pid-{rank}").read_text():
        time.sleep(0.01)
    while os.path.exists("/proc/" + (here / f"pid-{rank}").read_text()):
        time.sleep(0.01)
"""


def command(here: Path, body: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", CHILD_HEAD + textwrap.dedent(body), str(here)]


def start(here: Path, body: str, nproc: int, grace_s: float = 20.0) -> int:
    return start_processes(command(here, body), nproc, {}, here / "log", grace_s)


def launcher(here: Path, body: str, nproc: int, grace_s: float = 20.0) -> subprocess.Popen:
    """start_processes in a process of its own, which leaves with the code it returned (signals as 100 + N)."""
    code = (
        "import sys; from pathlib import Path; from pretrain.processes import start_processes\n"
        f"code = start_processes({command(here, body)!r}, {nproc}, {{}}, Path({str(here / 'log')!r}), {grace_s})\n"
        "sys.exit(code if code >= 0 else 100 - code)"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_files(here: Path, *names: str) -> None:
    limit = time.monotonic() + 60
    while not all((here / name).exists() for name in names):
        assert time.monotonic() < limit, f"{names} did not appear; there are {sorted(p.name for p in here.iterdir())}"
        time.sleep(0.01)


def gone(here: Path, rank: int) -> bool:
    try:
        os.kill(int((here / f"pid-{rank}").read_text()), 0)
    except ProcessLookupError:
        return True
    return False


def test_every_rank_gets_its_environment(tmp_path: Path) -> None:
    body = """
        import json
        names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT MILL OMP_NUM_THREADS".split()
        (here / f"env-{rank}").write_text(json.dumps({name: os.environ[name] for name in names}))
        print(f"hello from {rank}", flush=True)
        print("and on stderr", file=sys.stderr, flush=True)
    """
    code = start_processes(command(tmp_path, body), 3, {"MILL": "wheel", "OMP_NUM_THREADS": "5"}, tmp_path / "log")
    assert code == 0
    seen = [json.loads((tmp_path / f"env-{rank}").read_text()) for rank in range(3)]
    ports = {env.pop("MASTER_PORT") for env in seen}
    assert len(ports) == 1
    assert 1024 < int(ports.pop()) < 65536
    assert seen == [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
        | {"MASTER_ADDR": "127.0.0.1", "MILL": "wheel", "OMP_NUM_THREADS": "5"}
        for rank in range(3)
    ]
    assert sorted(path.name for path in (tmp_path / "log").iterdir()) == ["rank-1.log", "rank-2.log"]
    assert (tmp_path / "log" / "rank-2.log").read_text() == "hello from 2\nand on stderr\n"


def test_a_mistake_that_rank_0_has_named_is_not_explained_again(tmp_path: Path) -> None:
    process = launcher(tmp_path, "print('what and where', flush=True); sys.exit(2)", 2, grace_s=0.2)
    out, _ = process.communicate()
    assert (process.returncode, out) == (2, "what and where\n")


def test_rank_0_writes_to_our_output_and_a_failing_rank_is_explained(tmp_path: Path) -> None:
    body = """
        print(f"line of {rank}", flush=True)
        if rank == 1:
            wait_for("pid-0")
            sys.exit(4)
        wait_for("never") if rank == 2 else None
    """
    process = launcher(tmp_path, body, 3, grace_s=0.2)
    out, _ = process.communicate()
    assert process.returncode == 4
    assert "line of 0" in out
    assert "rank 1 left with exit code 4" in out
    assert "    line of 1" in out
    assert "line of 2" not in out
    assert gone(tmp_path, 2)


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0, 0, 0], 0),
        ([0, 5, 0], 5),
        ([4, 3, 4], 3),  # a data error is the reason, whoever noticed first
        ([1, 2, -9], 2),
    ],
)
def test_one_code_for_all(tmp_path: Path, codes: list[int], expected: int) -> None:
    body = f"""
        code = {codes}[rank]
        wait_for("pid-0", "pid-1", "pid-2")
        os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)
    """
    assert start(tmp_path, body, 3) == expected


def test_the_first_to_fail_gives_the_code(tmp_path: Path) -> None:
    body = """
        if rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        wait_until_reaped(2)
        sys.exit(4)
    """
    assert start(tmp_path, body, 3) == -9


def test_peers_get_their_grace_then_a_term_then_a_kill(tmp_path: Path) -> None:
    """Rank 1 leaves by itself in time; rank 2 needs SIGTERM; rank 3 ignores it and takes a subprocess along."""
    body = """
        if rank == 0:
            wait_for("ready-2", "ready-3")
            sys.exit(4)
        if rank == 1:
            wait_until_reaped(0)
            touch("left-by-itself")
            sys.exit(4)
        if rank == 2:
            signal.signal(signal.SIGTERM, lambda *_: (touch("termed"), sys.exit(0)))
            touch("ready-2")
        if rank == 3:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            child = os.fork()
            if child == 0:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                (here / "pid-4").write_text(str(os.getpid()))
            else:
                wait_for("pid-4")
                touch("ready-3")
        while True:
            time.sleep(0.01)
    """
    assert start(tmp_path, body, 4, grace_s=1.0) == 4
    assert (tmp_path / "left-by-itself").exists()
    assert (tmp_path / "termed").exists()
    wait_until = time.monotonic() + 30
    while not gone(tmp_path, 4) and time.monotonic() < wait_until:
        time.sleep(0.01)  # an orphan is reaped by init, a moment later
    state = Path(f"/proc/{(tmp_path / 'pid-4').read_text()}/stat")
    assert gone(tmp_path, 4) or state.read_text().split()[2] == "Z"


WAITING = """
    for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
        def handler(number, frame, name=name):
            touch(f"{name}-{rank}")
            if name != "SIGUSR1" and not (here / "stubborn").exists():
                sys.exit(0)
        signal.signal(getattr(signal, name), handler)
    touch(f"ready-{rank}")
    while True:
        time.sleep(0.01)
"""


def test_signals_reach_every_rank_and_no_kill_hurries_a_save(tmp_path: Path) -> None:
    process = launcher(tmp_path, WAITING, 2)
    wait_for_files(tmp_path, "ready-0", "ready-1")
    process.send_signal(signal.SIGUSR1)
    wait_for_files(tmp_path, "SIGUSR1-0", "SIGUSR1-1")
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 0
    assert (tmp_path / "SIGTERM-0").exists()
    assert (tmp_path / "SIGTERM-1").exists()


def test_a_second_interrupt_kills(tmp_path: Path) -> None:
    (tmp_path / "stubborn").touch()
    process = launcher(tmp_path, WAITING, 2)
    wait_for_files(tmp_path, "ready-0", "ready-1")
    process.send_signal(signal.SIGINT)
    wait_for_files(tmp_path, "SIGINT-0", "SIGINT-1")
    process.send_signal(signal.SIGINT)
    assert process.wait() == 109
    assert gone(tmp_path, 0)
    assert gone(tmp_path, 1)


def test_killing_us_leaves_no_orphans(tmp_path: Path) -> None:
    process = launcher(tmp_path, WAITING, 2)
    wait_for_files(tmp_path, "ready-0", "ready-1")
    process.kill()
    process.wait()
    wait_for_files(tmp_path, "SIGTERM-0", "SIGTERM-1")


def test_a_command_that_does_not_exist_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot start /no/such/python"):
        start_processes(["/no/such/python"], 2, {}, tmp_path)
