"""One real SLURM cluster for all tests here: four nodes on this machine, see lab.sh."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from warm_python import Server

LAB = Path(__file__).with_name("lab.sh")
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "squeue", "scancel", "sinfo")
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
PATIENCE_S = 240.0
"""For any one thing to happen; on a machine that does nothing else the slowest takes 30 s."""


@dataclass
class Cluster:
    """A cluster that is up."""

    here: Path
    mode: str

    def run(self, *words: str) -> str:
        """Output of a SLURM command, given inside the cluster."""
        environment = {**os.environ, "LAB": str(self.here)}
        return subprocess.run(
            [str(LAB), "exec", *words], env=environment, check=True, stdout=subprocess.PIPE, text=True, timeout=120
        ).stdout

    def state(self, job: str) -> str:
        """SLURM's word for a job, such as RUNNING; of an array, of all its tasks that have not completed."""
        states = set(self.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").split())
        return " ".join(sorted(states - {"COMPLETED"})) or "COMPLETED"

    def idle(self) -> None:
        """Wait until all nodes are free: a job that may have more nodes takes those that are free when it begins. Not
        `idle*`: a node that was set back from down has to answer first."""
        self.until(lambda: self.run("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * 4, "four idle nodes")

    def finished(self, job: str, log: Path) -> str:
        """The state in which a job ended, when it has; shows `log` when it does not end."""
        self.until(lambda: set(self.state(job).split()) <= OVER, f"job {job} ends", log)
        return self.state(job)

    def until(self, holds: Callable[[], object], what: str, log: Path | None = None, job: str = "") -> None:
        """Wait until `holds()`; not longer than `job` lives."""
        limit = time.monotonic() + PATIENCE_S
        while not holds():
            ended = bool(job) and set(self.state(job).split()) <= OVER
            if (ended and not holds()) or time.monotonic() > limit:
                text = "\n".join(path.read_text() for path in sorted(log.glob("*.log"))) if log else ""
                raise AssertionError(f"{what}: not to be\n{self.run('squeue', '-a', '-t', 'all')}\n{text}")
            time.sleep(0.1)


@pytest.fixture(scope="session")
def warm() -> Iterator[Server]:
    """An interpreter for jobs that has imported everything."""
    with tempfile.TemporaryDirectory(prefix="hw") as short, Server(Path(short)) as server:
        os.chmod(short, 0o755)
        yield server


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(f"SLURM is not installed ({', '.join(missing)}); apt-get install slurm-wlm munge")
    with tempfile.TemporaryDirectory(prefix="hl") as short:  # pytest's own folders are too long for munge's socket
        os.chmod(short, 0o755)
        here = Path(short) / "lab"
        port = 20000 + os.getpid() % 100 * 120  # without namespaces two clusters share this machine's ports
        environment = {**os.environ, "LAB": str(here), "PORT": str(port)}
        try:
            up = subprocess.run([str(LAB), "up"], env=environment, capture_output=True, text=True, timeout=180)
            if up.returncode:
                pytest.fail(f"the cluster did not come up: {up.stderr}")
            programs = Path(short) / "bin"
            programs.mkdir()
            for name in ("sbatch", "scontrol", "squeue", "scancel", "sinfo", "srun"):
                # The job must find the programs themselves: it inherits the PATH with which it was submitted.
                text = f'#!/bin/sh\nexport LAB="{here}" PATH="{os.environ["PATH"]}"\nexec "{LAB}" exec {name} "$@"\n'
                (programs / name).write_text(text)
                (programs / name).chmod(0o755)
            before = os.environ["PATH"]
            os.environ["PATH"] = f"{programs}:{before}"
            try:
                yield Cluster(here, up.stdout.strip())
            finally:
                os.environ["PATH"] = before
        finally:
            subprocess.run([str(LAB), "down"], env=environment, check=True, timeout=120)
