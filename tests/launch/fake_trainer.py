"""A job script whose trainer is a stand-in that does what the test says."""

import json
from pathlib import Path

from fake_slurm import PYTHON, FakeSlurm

from launch.site import Site
from launch.slurm import SlurmRequest, render_script

# Stands in for the interpreter, so for the trainer. `plan` has one JSON list a run, by rank: a number is exited with,
# "kill" and "wait" mean what they say, "save" waits for USR1, "peer" leaves with 1 once the killed are gone.
# Nobody leaves before all have started, and who leaves with a number is not disturbed by the end of others.
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
plan = json.loads((here / "plan").read_text())[int(os.environ["SLURM_RESTART_COUNT"])]
for name in plan.get("saves", []) if rank == 0 else []:
    (Path(os.environ["LOG_DIR"]).parent / "checkpoints" / name).mkdir(parents=True)
do = plan["codes"][rank]
if do != "wait":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
started = [here / f"started-{os.environ['SLURM_RESTART_COUNT']}-{r}" for r in range(int(os.environ["WORLD_SIZE"]))]
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
    do = 0
sys.exit(do)
"""


def job(slurm: FakeSlurm, run_dir: Path, plan: list, site: Site | None = None, **options) -> Path:
    """A job script of 2 nodes with 2 processes each whose trainer follows `plan`."""
    runs = [item if isinstance(item, dict) else {"codes": item} for item in plan]
    (slurm.here / "plan").write_text(json.dumps(runs))
    python = str(slurm.program("trainer", PYTHON + TRAINER))
    site = (site or Site()).model_copy(update={"python": python})
    request = SlurmRequest(**{"nodes": 2, "gpus_per_node": 2, **options})
    path = run_dir / "job.sh"
    path.write_text(render_script(request, run_dir, run_dir / "launch" / "0001", run_dir.parent, site))
    return path
