"""`headrace launch slurm`: one sbatch script, checked, shown or submitted.

The script (`templates/slurm.sh.j2`) starts one process per GPU with srun. Two minutes before the time limit, and on
failures that may pass, it puts its job back into the queue; the run continues from its newest checkpoint. srun's own
exit code is no guide (22.05 answered 143 for a task that left with 7), so every process notes its code in
`<run>/log/exit-<rank>` and the script decides by those.
"""

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from headrace.errors import ConfigError
from headrace.version import __version__
from launch.preflight import checked_config
from launch.site import Site
from launch.snapshot import next_snapshot, write_snapshot


@dataclass(frozen=True)
class SlurmRequest:
    """What to ask the cluster for."""

    nodes: int
    gpus_per_node: int
    """0: a CPU job."""
    tasks_per_node: int = 0
    """Processes per node; 0: one per GPU, or one on a CPU node."""
    partition: str = ""
    account: str = ""
    time: str = "24:00:00"
    """SLURM's time limit, such as 24:00:00 or 7-00:00:00."""
    job_name: str = ""
    """The run folder's name when empty."""
    container: str = ""
    """Image for pyxis' `--container-image`; none when empty."""
    max_failures: int = 3
    """Failures in a row without a new checkpoint after which the job is not requeued."""

    @property
    def processes_per_node(self) -> int:
        """Processes that srun starts on each node."""
        return self.tasks_per_node or self.gpus_per_node or 1


def check_request(request: SlurmRequest) -> None:
    """Raises ConfigError naming the option that cannot be used."""
    for option, number, least in (
        ("--nodes", request.nodes, 1),
        ("--gpus-per-node", request.gpus_per_node, 0),
        ("--tasks-per-node", request.tasks_per_node, 0),
        ("--max-failures", request.max_failures, 1),
    ):
        if number < least:
            raise ConfigError(f"{option}: at least {least}, got {number}")
    if request.gpus_per_node and request.tasks_per_node not in (0, request.gpus_per_node):
        raise ConfigError(
            f"--tasks-per-node {request.tasks_per_node}: there is one process per GPU; leave it out, or set "
            "--gpus-per-node 0 for a CPU cluster"
        )
    if not re.fullmatch(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}", request.time):
        raise ConfigError(f"--time {request.time!r}: write minutes, HH:MM:SS or D-HH:MM:SS")
    for option, text in (
        ("--partition", request.partition),
        ("--account", request.account),
        ("--job-name", request.job_name),
        ("--container", request.container),
    ):
        _refuse_control_characters(option, text)


def render_script(request: SlurmRequest, run_dir: Path, snapshot: Path, work_dir: Path, site: Site) -> str:
    """The job script. Every text a person gave is quoted for the place where it stands."""
    check_request(request)
    for name, path in (("run.dir", run_dir), ("the working directory", work_dir)):
        _refuse_control_characters(name, str(path))
    python = site.python or ("python3" if request.container else sys.executable)
    options = {
        "job-name": request.job_name or run_dir.name,
        "nodes": request.nodes,
        "ntasks-per-node": request.processes_per_node,
        "time": request.time,
        **({"gres": f"gpu:{request.gpus_per_node}"} if request.gpus_per_node else {}),
        **({"partition": request.partition} if request.partition else {}),
        **({"account": request.account} if request.account else {}),
        "output": f"{_no_patterns(run_dir)}/log/slurm-%j.log",
        **{name: value for name, value in site.sbatch.items() if value is not False},
    }
    environment = Environment(
        loader=PackageLoader("launch"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    return environment.get_template("slurm.sh.j2").render(
        version=__version__,
        directives=[directive(name, value) for name, value in options.items()],
        request=request,
        run_dir=run_dir,
        snapshot=snapshot,
        log_pattern=f"{_no_patterns(run_dir)}/log/rank-%t.log",
        work_dir=work_dir,
        container_mounts=_container_mounts(run_dir, work_dir, site),
        site=site,
        # -P: with -m, Python would take packages of the working directory before those of the snapshot.
        command=[python, "-P", "-m", "pretrain", "train", snapshot / "config.yaml"],
    )


def directive(name: str, value: object) -> str:
    """An `#SBATCH` line. sbatch ends a word at a space even after a backslash, so odd values need double quotes."""
    if value is True:
        return f"#SBATCH --{name}"
    text = str(value)
    _refuse_control_characters(f"--{name}", text)
    if not re.fullmatch(r"[\w@%+=:,./-]+", text, re.ASCII):
        text = '"' + re.sub(r'["\\]', r"\\\g<0>", text) + '"'
    return f"#SBATCH --{name}={text}"


def launch_slurm(
    config_path: str | Path, overrides: Sequence[str], request: SlurmRequest, site: Site, dry_run: bool
) -> str:
    """The script when `dry_run`, and nothing is written or run; else the id of the submitted job.

    Raises ConfigError (also when sbatch refuses the job) and LayoutError.
    """
    check_request(request)
    config = checked_config(config_path, overrides, request.nodes * request.processes_per_node)
    run_dir = Path(config.run.dir).absolute()
    snapshot = next_snapshot(run_dir)
    script = render_script(request, run_dir, snapshot, Path.cwd(), site)
    if dry_run:
        return script
    job = write_snapshot(snapshot, config, script)
    (run_dir / "log").mkdir(exist_ok=True)  # SLURM writes its output there and makes no folders
    try:
        answer = subprocess.run(["sbatch", "--parsable", str(job)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ConfigError(f"sbatch not found: run this where jobs are submitted, or submit {job} there") from None
    if answer.returncode:
        raise ConfigError(f"sbatch refused {job}: {' '.join(answer.stderr.split())}")
    job_id = answer.stdout.strip().partition(";")[0]
    (snapshot / "job-id").write_text(job_id + "\n")
    return job_id


def _container_mounts(run_dir: Path, work_dir: Path, site: Site) -> str:
    """Mounts in pyxis' notation; the run folder holds the snapshot with the code."""
    for path in (run_dir, work_dir):
        if re.search("[,:]", str(path)):
            raise ConfigError(f"{path}: a container cannot mount a path with a comma or a colon in its name")
    return ",".join([*dict.fromkeys(f"{path}:{path}" for path in (run_dir, work_dir)), *site.container_mounts])


def _no_patterns(path: Path) -> str:
    """`path` where SLURM replaces %j and the like."""
    return str(path).replace("%", "%%")


def _refuse_control_characters(name: str, text: str) -> None:
    if any(not character.isprintable() for character in text):
        raise ConfigError(f"{name} {text!r}: control characters and line breaks cannot stand in a job script")
