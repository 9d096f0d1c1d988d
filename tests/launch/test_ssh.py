"""Runs over ssh, with a stand-in for ssh that runs the remote command here, in an environment of its own."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from headrace.errors import ConfigError
from launch.attempts import Attempts
from launch.ssh import read_hosts, remote_command, run_hosts
from pretrain.processes import StopRequest

SSH = """#!/bin/bash
# ssh [-options] HOST COMMAND: the remote login shell gets the command as one string.
while [[ $1 == -* ]]; do case $1 in -o) shift 2 ;; *) shift ;; esac; done
host=$1
[ "$host" != unreachable ] || { echo "ssh: connect to host $host: No route to host" >&2; exit 255; }
exec env -i PATH="$PATH" HOME="$HOME" PYTHONPATH="$WORKTREE" HOST_NAME="$host" bash -c "$2"
"""

# Stands in for `pretrain` on the hosts: writes its place down, then does what `plan` says for its attempt and rank.
TRAINER = """
import json, os, signal, sys, time
from pathlib import Path
here, rank = Path(sys.argv[2]).parent, int(os.environ["RANK"])
signal.alarm(120)
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "HOST_NAME")
attempt = sum('"start"' in line for line in (here / "run" / "launch" / "attempts.jsonl").open()) - 1
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(4))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(4))
(here / f"seen-{attempt}-{rank}").write_text(json.dumps({name: os.environ[name] for name in names}))
do = json.loads((here / "plan").read_text())[attempt][rank]
while do == "wait":
    time.sleep(0.01)
sys.exit(do)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the stand-ins; ssh on PATH, and a package `pretrain` before ours on the hosts."""
    (tmp_path / "bin").mkdir()
    ssh = tmp_path / "bin" / "ssh"
    ssh.write_text(SSH)
    ssh.chmod(ssh.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("WORKTREE", str(Path(__file__).parents[2]))
    (tmp_path / "trainer.py").write_text(TRAINER)
    return tmp_path


def launch(here: Path, plan: str, hosts: str = "mill-1 slots=2\nmill-2 slots=2\n") -> subprocess.Popen[str]:
    """A launcher process whose hosts run the stand-in trainer."""
    (here / "plan").write_text(plan)
    (here / "hosts").write_text(hosts)
    code = f"""
import sys
from pathlib import Path
from launch import ssh
from launch.attempts import Attempts, Limits
from launch.local import run_with_restarts
ssh.GRACE_S = 1.0
host = {str(here / "host.py")!r}
hosts = ssh.read_hosts({str(here / "hosts")!r})
run_dir = Path({str(here / "run")!r})
def attempt(stop):
    env = {{"MASTER_ADDR": hosts.names[0], "MASTER_PORT": "12345", "WORLD_SIZE": "4"}}
    words = ["train", {str(here / "plan")!r}]
    commands = [["ssh", "-T", "-o", "BatchMode=yes", name,
        ssh.remote_command(at, hosts.slots, env, run_dir, words).replace("-m launch.ssh_host", host)]
        for at, name in enumerate(hosts.names)]
    return ssh.run_hosts(commands, hosts.names, stop)
sys.exit(run_with_restarts(attempt, Attempts(run_dir), "ssh", hosts.names, 4, Limits(), pause=lambda _: None))
"""
    (here / "host.py").write_text(
        "import sys\n"
        "from launch import ssh_host\n"
        "real = ssh_host.start_processes\n"
        f"swap = lambda command: [sys.executable, '-IS', {str(here / 'trainer.py')!r}, *command[3:]]\n"
        "ssh_host.start_processes = lambda command, *a, **k: real(swap(command), *a, **k)\n"
        "sys.exit(ssh_host.main(*sys.argv[1:]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.environ["WORKTREE"]}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)


def seen(here: Path, attempt: int) -> list[dict[str, str]]:
    return [json.loads((here / f"seen-{attempt}-{rank}").read_text()) for rank in range(4)]


def test_every_process_finds_its_place(here: Path) -> None:
    process = launch(here, "[[0, 0, 0, 0]]")
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 0, error
    for rank, found in enumerate(seen(here, 0)):
        assert found == {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % 2),
            "WORLD_SIZE": "4",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "mill-1",
            "HOST_NAME": f"mill-{1 + rank // 2}",
        }


def test_a_failure_ends_the_others_and_all_start_again(here: Path) -> None:
    process = launch(here, '[["wait", "wait", 5, "wait"], [0, 0, 0, 0]]')
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 0, error
    assert "failure 1 without a new checkpoint" in error
    assert len(seen(here, 1)) == 4


def test_a_mistake_of_the_user_is_not_repeated(here: Path) -> None:
    process = launch(here, "[[0, 0, 2, 0]]")
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 2, error
    assert "mill-2: left with exit code 2" in error


def test_a_host_that_cannot_be_reached_may_come_back(here: Path) -> None:
    process = launch(
        here,
        '[["wait", "wait", 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]',
        hosts="mill-1 slots=2\nunreachable slots=2\n",
    )
    limit = time.monotonic() + 120
    while not (here / "run" / "launch" / "attempts.jsonl").exists():
        assert time.monotonic() < limit
        time.sleep(0.05)
    error = process.communicate(timeout=240)[1]
    assert process.returncode != 0
    assert "unreachable: ssh could not connect, or the connection broke" in error
    assert len([event for event in Attempts(here / "run").events() if event["event"] == "start"]) > 1


def test_sigterm_reaches_every_process_on_every_host(here: Path) -> None:
    process = launch(here, '[["wait", "wait", "wait", "wait"]]')
    limit = time.monotonic() + 120
    while not all((here / f"seen-0-{rank}").exists() for rank in range(4)):
        assert time.monotonic() < limit
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 4, error
    assert "again in" not in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no host"),
        ("a slots=8\nb slots=4\n", "same number of slots"),
        ("a slots=two\n", "line 1"),
        ("-oProxyCommand=x\n", "line 1"),
        ("a\n# b\na\n", "line 3: a stands twice"),
    ],
)
def test_bad_host_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_hosts(tmp_path / "hosts")


def test_hosts_are_read(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# mills\nme@a slots=8  # first\n\nb slots=8\n")
    hosts = read_hosts(tmp_path / "hosts")
    assert (hosts.names, hosts.slots) == (["me@a", "b"], 8)


def test_hostile_names_stay_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a b'; touch pwned; '$(touch pwned)"
    folder.mkdir()
    monkeypatch.chdir(folder)
    line = remote_command(0, 1, {"A": "b'c $d"}, folder, ["train", "x y.yaml"])
    shown = subprocess.run(
        ["bash", "-c", line.replace("exec env", "exec printf '%s\\n'", 1)], capture_output=True, text=True, check=True
    )
    assert shown.stdout.splitlines()[-4:] == ["1", str(folder), "train", "x y.yaml"]
    assert "A=b'c $d" in shown.stdout.splitlines()
    assert not (tmp_path / "pwned").exists()
    assert not list(folder.iterdir())


def test_an_ssh_that_is_not_there_is_one_line() -> None:
    with pytest.raises(ConfigError, match="cannot start /no/such/ssh"):
        run_hosts([["/no/such/ssh"]], ["a"], StopRequest())
