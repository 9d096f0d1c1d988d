"""`headrace launch ssh`: processes on several machines without a scheduler, over `ssh`.

    headrace launch ssh hosts.txt my.yaml           hosts.txt: a host a line, `mill-1 slots=8`, the first one leads

One `ssh` to each host starts `python -m launch.ssh_host`, which starts its processes and sees them to their end.
Signals go as words over ssh's standard input; when the connection breaks, the processes there are ended. Code and
configuration are this working tree's, so it must be on a file system that all hosts share, as must the run folder.
"""

import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from headrace.errors import ConfigError, ExitCode
from launch.attempts import Attempts, Limits, judge
from launch.local import check_limits, run_with_restarts
from launch.preflight import checked_config
from pretrain.processes import StopRequest

GRACE_S = 10.0
"""What hosts get to notice, after one of them has failed, before their processes are ended."""
POLL_S = 0.05


@dataclass(frozen=True)
class Hosts:
    """The machines, in order of their ranks."""

    names: list[str]
    slots: int
    """Processes on each."""


def read_hosts(path: str | Path) -> Hosts:
    """A host file: a host a line, with `slots=N` (1 when not given); `#` begins a comment. Raises ConfigError."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    names, slots = [], []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        found = [re.fullmatch(r"slots=([1-9]\d*)", word) for word in words[1:]]
        if words[0].startswith("-") or len(words) > 2 or None in found:
            raise ConfigError(f"{path}, line {number}: write `host` or `host slots=8`, not {line.strip()!r}")
        if words[0] in names:
            raise ConfigError(f"{path}, line {number}: {words[0]} stands twice; give it more slots")
        names.append(words[0])
        slots += [int(match[1]) for match in found if match] or [1]
    if not names:
        raise ConfigError(f"{path}: names no host")
    if len(set(slots)) > 1:
        raise ConfigError(
            f"{path}: every host must have the same number of slots, these have {min(slots)} to {max(slots)}: every "
            "step ends with an exchange among all processes, so hosts with more would wait for the others"
        )
    return Hosts(names, slots[0])


def launch_ssh(
    hostfile: str | Path,
    config_path: str | Path,
    overrides: Sequence[str],
    limits: Limits,
    master: str = "",
    ssh: Sequence[str] = ("ssh", "-T", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=15"),
) -> int:
    """Train on all hosts; the exit code of the last attempt. Raises ConfigError, LayoutError.

    `master`: the first host's address for the others; its name in the file when empty.
    """
    check_limits(limits)
    hosts = read_hosts(hostfile)
    world_size = len(hosts.names) * hosts.slots
    run_dir = Path(checked_config(config_path, overrides, world_size).run.dir)
    address = master or hosts.names[0].rpartition("@")[2]
    words = ["train", str(Path(config_path).absolute()), *overrides]

    def attempt(stop: StopRequest) -> int:
        port = random.randrange(12000, 32000)  # below the ports of outgoing connections; a new one each time
        environment = {"MASTER_ADDR": address, "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
        commands = [
            [*ssh, name, remote_command(number, hosts.slots, environment, run_dir, words)]
            for number, name in enumerate(hosts.names)
        ]
        return run_hosts(commands, hosts.names, stop)

    return run_with_restarts(attempt, Attempts(run_dir), "ssh", hosts.names, world_size, limits)


def remote_command(number: int, slots: int, environment: dict[str, str], run_dir: Path, words: Sequence[str]) -> str:
    """What host `number` runs, as one shell line; its login shell may be any that knows quotes."""
    passed = {name: value for name, value in os.environ.items() if name.startswith(("NCCL_", "GLOO_", "HEADRACE_"))}
    passed |= {name: os.environ[name] for name in ("OMP_NUM_THREADS",) if name in os.environ}
    settings = [f"{name}={value}" for name, value in {**passed, **environment}.items()]
    inner = ["env", *settings, sys.executable, "-m", "launch.ssh_host", str(number), str(slots), str(run_dir), *words]
    return f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(inner)}"


def run_hosts(commands: Sequence[Sequence[str]], names: Sequence[str], stop: StopRequest) -> int:
    """Run one command for each host and return one exit code for all, as `judge` sees them.

    After a failure the others get some seconds to say why themselves, then their processes are ended.
    """
    try:
        # Sessions of their own: a Ctrl-C reaches the hosts once, through us.
        children = [subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True) for words in commands]
    except OSError as error:
        raise ConfigError(f"cannot start {commands[0][0]}: {error.strerror}") from None

    def tell(word: str) -> None:
        for child in children:
            if child.poll() is None and child.stdin is not None:
                try:
                    child.stdin.write(word.encode() + b"\n")
                    child.stdin.flush()
                except OSError:
                    pass  # the connection is gone; its end comes with poll()

    def forward(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGUSR1:
            stop.insisted, stop.asked = stop.asked, True
        tell(signal.Signals(number).name)

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        first = _wait(children, tell, time.monotonic)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for child in children:
            child.kill()
            child.wait()
    # 255 is ssh's own: no connection, or it broke; the host may be back by the next attempt.
    codes = {
        at: int(ExitCode.RECOVERABLE) if child.returncode == 255 else child.returncode
        for at, child in enumerate(children)
    }
    outcome = judge(codes, first)
    if outcome.code:
        failed = next(at for at, code in codes.items() if code == outcome.code)
        how = "ssh could not connect, or the connection broke" if children[failed].returncode == 255 else ""
        sys.stderr.write(f"headrace: {names[failed]}: {how or f'left with exit code {outcome.code}'}\n")
    return outcome.code


def _wait(
    children: list[subprocess.Popen[bytes]], tell: Callable[[str], None], clock: Callable[[], float]
) -> int | None:
    """Wait for all; which failed first."""
    first: int | None = None
    deadlines: list[tuple[float, str]] = []
    while None in [child.poll() for child in children]:
        failed = [at for at, child in enumerate(children) if child.returncode]
        if failed and first is None:
            first = failed[0]
            deadlines = [(clock() + GRACE_S, "SIGTERM"), (clock() + GRACE_S + 5.0, "SIGKILL")]
        if deadlines and clock() >= deadlines[0][0]:
            tell(deadlines.pop(0)[1])
            if not deadlines:
                time.sleep(1.0)
                for child in children:
                    child.kill()
        time.sleep(POLL_S)
    failed = [at for at, child in enumerate(children) if child.returncode]
    return first if first is not None else next(iter(failed), None)
