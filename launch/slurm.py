"""`headrace launch slurm`: one sbatch script, checked, shown or submitted.

The script (`templates/slurm.sh.j2`) asks the nodes whether they are fit, starts one process per GPU with srun, and on
failures that may pass starts them again: on the same nodes, on spare ones, or in the next job. Before the time limit it
lets the run save and puts its job back into the queue. srun's own exit code is no guide (22.05 answered 143 for a task
that left with 7), so every process notes its code in `<run>/log/exit-<rank>`; `attempts.py` decides by those.
"""

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from headrace.errors import ConfigError
from headrace.version import __version__
from launch.attempts import Attempts
from launch.preflight import checked_config, checks_of, usable_node_counts
from launch.request import SlurmRequest, check_request, refuse_control_characters
from launch.site import Site
from launch.snapshot import next_snapshot, write_snapshot
from pretrain.config import RunConfig


@dataclass(frozen=True)
class Script:
    """What a job script is made of."""

    request: SlurmRequest
    run_dir: Path
    """Of a sweep: the folder of all its runs."""
    snapshot: Path
    work_dir: Path
    site: Site
    node_counts: Sequence[int] = ()
    """Numbers of nodes on which the run's layout works; `request.nodes` when empty."""
    points: int = 0
    """Runs of a sweep; 0: an ordinary job."""
    at_once: int = 0
    """Runs of a sweep that may run at the same time; 0: all."""


def render_script(script: Script) -> str:
    """The job script. Every text a person gave is quoted for the place where it stands."""
    request, site, run_dir = script.request, script.site, script.run_dir
    check_request(request)
    for name, path in (("run.dir", run_dir), ("the working directory", script.work_dir)):
        refuse_control_characters(name, str(path))
    container = request.container or site.container
    python = site.python or ("python3" if container else sys.executable)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("launch"),  # for `extends` in a template of the site's own
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    try:
        if site.template:
            template = environment.from_string(Path(site.template).read_text(encoding="utf-8"))
        else:
            template = environment.get_template("slurm.sh.j2")
        return template.render(
            version=__version__,
            directives=[directive(name, value) for name, value in _options(script).items()],
            request=request,
            run_dir=run_dir,
            snapshot=script.snapshot,
            work_dir=script.work_dir,
            container=container,
            container_mounts=_container_mounts(run_dir, script.work_dir, site) if container else "",
            site=site,
            node_counts=script.node_counts or [request.nodes],
            spare_nodes=_most_nodes(request) > request.fewest_nodes,
            points=script.points,
            python=python,
            batch_python=site.batch_python or ("python3" if container else python),
        )
    except OSError as error:
        raise ConfigError(f"template {site.template}: {error.strerror}") from None
    except jinja2.TemplateError as error:
        line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise ConfigError(f"template {site.template or 'slurm.sh.j2'}{line}: {error.message}") from None


def _options(script: Script) -> dict[str, object]:
    """sbatch's options by long name."""
    request, site = script.request, script.site
    most, partition = _most_nodes(request), request.partition or site.partition
    account = request.account or site.account
    throttle = f"%{script.at_once}" if script.at_once else ""
    logs = f"{no_patterns(script.run_dir)}/log"
    tasks: dict[str, object] = {"ntasks-per-node": request.processes_per_node}
    if most > request.fewest_nodes:
        # With numbers of tasks SLURM (22.05) gives the fewest nodes of a range, or waits for the most; with none it
        # gives as many as there are.
        per_task = site.sbatch.get("cpus-per-task", 1)
        tasks = {"mincpus": request.processes_per_node * (per_task if isinstance(per_task, int) else 1)}
    return {
        "job-name": request.job_name or script.run_dir.name,
        "nodes": most if most == request.fewest_nodes else f"{request.fewest_nodes}-{most}",
        **tasks,
        "time": request.time,
        **({"gres": f"gpu:{request.gpus_per_node}"} if request.gpus_per_node else {}),
        **({"partition": partition} if partition else {}),
        **({"account": account} if account else {}),
        **({"array": f"0-{script.points - 1}{throttle}"} if script.points else {}),
        **({"no-kill": True} if request.spares else {}),  # a lost node ends the attempt, not the job
        "output": f"{logs}/slurm-%A_%a.log" if script.points else f"{logs}/slurm-%j.log",
        **{name: value for name, value in site.sbatch.items() if value is not False},
    }


def _most_nodes(request: SlurmRequest) -> int:
    return request.nodes + request.spares


def directive(name: str, value: object) -> str:
    """An `#SBATCH` line. sbatch ends a word at a space even after a backslash, so odd values need double quotes."""
    if value is True:
        return f"#SBATCH --{name}"
    text = str(value)
    refuse_control_characters(f"--{name}", text)
    if not re.fullmatch(r"[\w@%+=:,./-]+", text, re.ASCII):
        text = '"' + re.sub(r'["\\]', r"\\\g<0>", text) + '"'
    return f"#SBATCH --{name}={text}"


@dataclass(frozen=True)
class Submitted:
    """What became of a launch."""

    script: str
    jobs: list[str]
    """Ids; none of a dry run."""
    snapshot: Path


def launch_slurm(
    config_path: str | Path, overrides: Sequence[str], request: SlurmRequest, site: Site, dry_run: bool
) -> Submitted:
    """Submit a run; when `dry_run`, nothing is written or run.

    Raises ConfigError (also when sbatch refuses the job) and LayoutError.
    """
    check_request(request)
    config = checked_config(config_path, overrides, request.nodes * request.processes_per_node)
    run_dir = Path(config.run.dir).absolute()
    counts = usable_node_counts(config, request.fewest_nodes, request.nodes, request.processes_per_node)
    script = Script(request, run_dir, next_snapshot(run_dir), Path.cwd(), site, counts)
    return submit(script, {"config.yaml": config}, dry_run)


def submit(script: Script, configs: dict[str, RunConfig], dry_run: bool = False) -> Submitted:
    """Write the snapshot with `configs` (by file name) and hand the job, or the chain of jobs, to sbatch."""
    text = render_script(script)
    if dry_run:
        return Submitted(text, [], script.snapshot)
    checks = checks_of(list(configs.values()), script.request, script.site, script.run_dir)
    job = write_snapshot(script.snapshot, configs, text, checks)
    (script.run_dir / "log").mkdir(exist_ok=True)  # SLURM writes its output there and makes no folders
    jobs: list[str] = []
    attempts = Attempts(script.run_dir)
    if not script.points:
        attempts.note("submitted", launcher="slurm", snapshot=script.snapshot.name)
    for _ in range(script.request.chain):
        jobs.append(_sbatch(job, jobs[-1] if jobs else ""))
    (script.snapshot / "job-id").write_text("\n".join(jobs) + "\n")
    if not script.points:  # a job may have begun by now, so this cannot be the note that starts all counts anew
        attempts.note("jobs", jobs=jobs)
    return Submitted(text, jobs, script.snapshot)


def _sbatch(job: Path, after: str) -> str:
    """The id of a new job, which begins when `after` has ended in whatever way."""
    dependency = [f"--dependency=afterany:{after}"] if after else []
    try:
        answer = subprocess.run(
            ["sbatch", "--parsable", *dependency, str(job)], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise ConfigError(f"sbatch not found: run this where jobs are submitted, or submit {job} there") from None
    if answer.returncode:
        raise ConfigError(f"sbatch refused {job}: {' '.join(answer.stderr.split())}")
    return answer.stdout.strip().partition(";")[0]


def _container_mounts(run_dir: Path, work_dir: Path, site: Site) -> str:
    """Mounts as pyxis and apptainer take them; the run folder holds the snapshot with the code."""
    for path in (run_dir, work_dir):
        if re.search("[,:]", str(path)):
            raise ConfigError(f"{path}: a container cannot mount a path with a comma or a colon in its name")
    return ",".join([*dict.fromkeys(f"{path}:{path}" for path in (run_dir, work_dir)), *site.container_mounts])


def no_patterns(path: Path) -> str:
    """`path` where SLURM replaces %j and the like."""
    return str(path).replace("%", "%%")
