"""A job script whose trainer is a stand-in that does what the test says."""

import json
import shutil
import sys
from pathlib import Path

from fake_slurm import PYTHON, FakeSlurm

import launch
from launch.request import SlurmRequest
from launch.site import Site
from launch.slurm import Script, render_script

# Stands in for the interpreter, so for the trainer. `plan` has one JSON list an attempt, by rank: a number is exited
# with, "kill" and "wait" mean what they say, "save" waits for USR1, "peer" leaves with 1 once the killed are gone.
# "saves" names checkpoints made, "step" is that of a training record which rank 0 writes. Nobody leaves before all have
# started, and who leaves with a number is not disturbed by the end of others.
TRAINER = r"""
import json, os, signal, sys, time
from pathlib import Path
here, rank = Path(os.environ["FAKE_SLURM"]), int(os.environ["RANK"])
got = []
signal.alarm(60)  # whatever goes wrong, no child waits for ever
signal.signal(signal.SIGUSR1, lambda *_: got.append("USR1"))
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
seen = {name: os.environ[name] for name in names} | {"argv": sys.argv[1:], "cwd": os.getcwd()}
seen |= {"PYTHONPATH": os.environ["PYTHONPATH"], "MILL": os.environ.get("MILL")}
(here / f"seen-{rank}").write_text(json.dumps(seen))
print("rank", rank, "was here", flush=True)
attempt = sum('"start"' in line for line in (Path(os.environ["RUN_DIR"]) / "launch" / "attempts.jsonl").open()) - 1
plan = json.loads((here / "plan").read_text())[attempt]
for name in plan.get("saves", []) if rank == 0 else []:
    (Path(os.environ["LOG_DIR"]).parent / "checkpoints" / name).mkdir(parents=True)
if rank == 0 and "step" in plan:
    with (Path(os.environ["RUN_DIR"]) / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": plan["step"], "loss": 1.0}) + "\n")
do = plan["codes"][rank]
if do != "wait":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
started = [here / f"started-{attempt}-{r}" for r in range(int(os.environ["WORLD_SIZE"]))]
started[rank].touch()
while not all(path.exists() for path in started):
    time.sleep(0.01)
if do == "peer":
    while not (here / "killed-2").exists() or not (here / "killed-3").exists():
        time.sleep(0.01)
    do = 1
if do == "kill":
    (here / f"killed-{rank}").touch()
    os.kill(os.getppid(), signal.SIGKILL)  # with the shell around us: the node is gone
    os.kill(os.getpid(), signal.SIGKILL)
while do == "wait" or (do == "save" and not got):
    time.sleep(0.01)
if do == "save":
    (here / f"saved-{rank}").write_text(" ".join(got))
    do = 4  # there is more to do
sys.exit(do)
"""


def job(slurm: FakeSlurm, run_dir: Path, plan: list, site: Site | None = None, **options) -> Path:
    """A job script of 2 nodes with 2 processes each whose trainer follows `plan`, an entry an attempt."""
    runs = [item if isinstance(item, dict) else {"codes": item} for item in plan]
    (slurm.here / "plan").write_text(json.dumps(runs))
    python = str(slurm.program("trainer", PYTHON + TRAINER))
    site = (site or Site()).model_copy(update={"python": python, "batch_python": sys.executable})
    request = SlurmRequest(**{"nodes": 2, "gpus_per_node": 2, **options})
    path = run_dir / "job.sh"
    path.write_text(render(request, run_dir, site))
    write_checks(run_dir, site)
    shutil.copy(path, run_dir / "launch" / "0001")  # what it submits when another job is to go on
    return path


def render(request: SlurmRequest, run_dir: Path, site: Site, **more) -> str:
    """The script of a run in `run_dir`, in the folder above it."""
    return render_script(Script(request, run_dir, run_dir / "launch" / "0001", run_dir.parent, site, **more))


def write_checks(run_dir: Path, site: Site) -> None:
    """The parts of the snapshot that the script itself uses."""
    snapshot = run_dir / "launch" / "0001"
    (snapshot / "code").mkdir(parents=True, exist_ok=True)
    if not (snapshot / "code" / "launch").exists():
        (snapshot / "code" / "launch").symlink_to(Path(launch.__file__).parent)
    checks = {"gpus": 0, "read": [str(run_dir)], "write": [str(run_dir)], **site.preflight.model_dump()}
    (snapshot / "checks.json").write_text(json.dumps(checks))
