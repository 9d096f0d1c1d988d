"""Stand-ins for srun, scontrol and sbatch that run a job script's processes here, so that the script itself runs.

They do what Slurm 22.05 was seen to do: srun answers 143 when a task fails, whatever the task's code; a signal to srun
reaches every process of every task; a requeue kills the batch script.
"""

import os
import signal
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PYTHON = f"#!{sys.executable} -IS\n"

SRUN = """
import os, signal, subprocess, sys, time
options, command = {}, []
for at, word in enumerate(sys.argv[1:]):
    if not word.startswith("--"):
        command = sys.argv[1 + at:]
        break
    name, _, value = word[2:].partition("=")
    options[name] = value
tasks, per_node = int(options["ntasks"]), int(options["ntasks-per-node"])
nodes = options["nodelist"].split(",")
assert tasks == int(options["nodes"]) * per_node == len(nodes) * per_node
assert options["open-mode"] == "append"
if any(word.endswith("node_check.py") for word in command):
    for node in nodes:
        env = {**os.environ, "SLURMD_NODENAME": node}
        subprocess.run([os.environ["REAL_PYTHON"], *command[1:]], env=env, stdout=subprocess.DEVNULL)
    sys.exit()
with open(os.environ["FAKE_SLURM"] + "/srun-options", "w") as file:
    file.write("\\n".join(sys.argv[1 : 1 + at]))
assert options["kill-on-bad-exit"] == "1"
children = []
def forward(number, frame):
    for child in children:
        if child.poll() is None:
            os.killpg(child.pid, number)
signal.signal(signal.SIGUSR1, forward)
for rank in range(tasks):
    log = open(options["output"].replace("%t", str(rank)).replace("%%", "%"), "ab")
    env = {**os.environ, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % per_node), "SLURM_NTASKS": str(tasks)}
    children.append(subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True))
deadline = None
while None in [child.poll() for child in children]:
    if deadline is None and any(child.returncode for child in children):
        forward(signal.SIGTERM, None)
        deadline = time.monotonic() + 2
    if deadline and time.monotonic() > deadline:
        forward(signal.SIGKILL, None)
    time.sleep(0.01)
sys.exit(143 if any(child.returncode for child in children) else 0)
"""

SCONTROL = """
import os, signal, sys
from pathlib import Path
here = Path(os.environ["FAKE_SLURM"])
if sys.argv[1:3] == ["show", "hostnames"]:
    print("\\n".join(sys.argv[3].split(",")))
elif sys.argv[1:3] == ["show", "node"]:
    assert sys.argv[3:] == ["-o", "no-such-node.invalid"]
    print("NodeName=no-such-node.invalid Arch=x86_64 NodeAddr=10.1.2.3 NodeHostName=x Version=22.05.8")
elif sys.argv[1] == "requeue":
    if (here / "no-requeue").exists():
        sys.exit("slurm_requeue error: Requested operation is presently disabled")
    (here / "requeued").write_text(sys.argv[2])
    os.kill(os.getppid(), signal.SIGTERM)
elif sys.argv[1] == "update":
    with (here / "updated").open("a") as file:
        file.write(" ".join(sys.argv[2:]) + "\\n")
else:
    sys.exit(f"fake scontrol: {sys.argv}")
"""

SINFO = """
import os, sys
from pathlib import Path
down = Path(os.environ["FAKE_SLURM"]) / "down"
bad = down.read_text().split() if down.exists() else []
for node in sys.argv[sys.argv.index("-n") + 1].split(","):
    print(node, "down*" if node in bad else "mixed")
"""

SBATCH = """
import os, shutil, sys
from pathlib import Path
here = Path(os.environ["FAKE_SLURM"])
if (here / "refuse").exists():
    sys.exit("sbatch: error: Batch job submission failed:\\n Invalid account")
assert sys.argv[1] == "--parsable", sys.argv
shutil.copy(sys.argv[-1], here / "job.sh")
with open(here / "sbatch-options", "a") as file:
    file.write(" ".join(sys.argv[2:-1]) + "\\n")
print("4711;cluster")
"""


@dataclass
class FakeSlurm:
    """The stand-ins in `here/bin`."""

    here: Path

    def __post_init__(self) -> None:
        (self.here / "bin").mkdir(parents=True)
        for name, source in (("srun", SRUN), ("scontrol", SCONTROL), ("sbatch", SBATCH), ("sinfo", SINFO)):
            self.program(name, PYTHON + source)
        self.program("sleep", "#!/bin/sh\n")  # the script's pauses are for real clusters

    def program(self, name: str, source: str) -> Path:
        """An executable file in `here/bin`."""
        path = self.here / "bin" / name
        path.write_text(source)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    def environment(self) -> dict[str, str]:
        """The environment in which the stand-ins are found."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("SLURM") and k != "OMP_NUM_THREADS"}
        return {
            **inherited,
            "FAKE_SLURM": str(self.here),
            "REAL_PYTHON": sys.executable,
            "PATH": f"{self.here / 'bin'}:{os.environ['PATH']}",
        }

    def start(self, script: Path, nodes: int, restarts: int = 0, **variables: str) -> subprocess.Popen[str]:
        """The batch script as SLURM starts it on the job's first node."""
        names = ["no-such-node.invalid", *(f"other-{number}.invalid" for number in range(1, nodes))]
        job = {
            "SLURM_JOB_ID": "40123",
            "SLURM_JOB_NODELIST": ",".join(names),
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_RESTART_COUNT": str(restarts),
        }
        return subprocess.Popen(
            ["bash", str(script)],
            env={**self.environment(), **job, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd="/",
        )

    def sbatch_options(self) -> list[str]:
        """Options of every sbatch so far."""
        path = self.here / "sbatch-options"
        return path.read_text().splitlines() if path.exists() else []

    def was_requeued(self) -> bool:
        """Whether the last batch script asked for a requeue; the question forgets the answer."""
        mark = self.here / "requeued"
        asked = mark.exists() and mark.read_text() == "40123"
        mark.unlink(missing_ok=True)
        return asked

    def run(self, script: Path, nodes: int, at_most: int = 10) -> tuple[int, int, str]:
        """(exit code of the last, number, output of all) batch scripts until one ends without a requeue."""
        output = ""
        for restarts in range(at_most):
            process = self.start(script, nodes, restarts)
            output += process.communicate()[0]
            if not self.was_requeued():
                return process.returncode, restarts + 1, output
            assert process.returncode == -signal.SIGTERM
        raise AssertionError(f"still requeued after {at_most} runs:\n{output}")


def parse_directives(script: str) -> dict[str, str]:
    """Options as sbatch 22.05 reads them: a space ends a word unless quoted, a backslash escapes all but a space, `#`
    at the start of a word ends the line."""
    found = {}
    for line in script.splitlines():
        if not line.startswith("#SBATCH"):
            continue
        rest, words = line.removeprefix("#SBATCH").lstrip(), []
        while rest and not rest.startswith("#"):
            word, quote, escaped, at = "", "", False, 0
            while at < len(rest) and (quote or not rest[at].isspace()):
                character = rest[at]
                if escaped:
                    word, escaped = word + character, False
                elif character == "\\":
                    escaped = True
                elif quote and character == quote:
                    quote = ""
                elif not quote and character in "\"'":
                    quote = character
                else:
                    word += character
                at += 1
            assert not quote, line
            words, rest = [*words, word], rest[at:].lstrip()
        assert len(words) == 1, line
        name, _, value = words[0].removeprefix("--").partition("=")
        found[name] = value
    return found
