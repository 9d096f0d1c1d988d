"""`headrace launch`: the commands."""

import re
from pathlib import Path
from typing import Annotated

import typer

from headrace.errors import ConfigError
from launch import jobs_cli

app = typer.Typer(help="Run on a SLURM cluster, or in several processes on this machine.", no_args_is_help=True)
for command in (jobs_cli.status, jobs_cli.logs, jobs_cli.cancel, jobs_cli.attach):
    app.command()(command)

Config = Annotated[Path, typer.Argument(help="The run's YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as train.steps=100.")
]
MaxFailures = Annotated[
    int, typer.Option(help="Failures in a row without a new checkpoint that are borne; one more ends the run.")
]
MaxSameStep = Annotated[int, typer.Option(help="Failures after the very same step that end the run.")]
Nodes = Annotated[str, typer.Option(help="Nodes, or a range such as 2-4: as many as there are.")]
GpusPerNode = Annotated[str, typer.Option(help="GPUs and processes on each node; 0 for a CPU cluster.")]
TasksPerNode = Annotated[str, typer.Option(help="Processes on each node of a CPU cluster.")]
Spares = Annotated[int, typer.Option(help="Nodes to ask for besides, to replace those that fail.")]
Partition = Annotated[str, typer.Option(help="SLURM partition.")]
Account = Annotated[str, typer.Option(help="SLURM account.")]
Time = Annotated[str, typer.Option(help="Time limit of one job; the run goes on in the next.")]
JobName = Annotated[str, typer.Option(help="Job name; the run folder's name when not given.")]
Container = Annotated[str, typer.Option(help="Container image, for pyxis or apptainer (see the site file).")]
SaveSeconds = Annotated[int, typer.Option(help="Seconds before the time limit at which the run saves and leaves.")]
SiteFile = Annotated[Path | None, typer.Option(help="YAML file with the cluster's own settings.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the job script, write and submit nothing.")]


@app.command()
def local(
    config: Config,
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(help="Processes to start.")] = 1,
    max_failures: MaxFailures = 3,
    max_same_step: MaxSameStep = 2,
) -> None:
    """Train on this machine in several processes and restart them after crashes."""
    from launch.attempts import Limits
    from launch.local import launch_local

    code = launch_local(config, overrides or [], nproc, Limits(max_failures, max_same_step))
    raise typer.Exit(code if code >= 0 else 128 - code)


@app.command()
def ssh(
    hostfile: Annotated[Path, typer.Argument(help="A host a line, such as `mill-1 slots=8`.", show_default=False)],
    config: Config,
    overrides: Overrides = None,
    master: Annotated[str, typer.Option(help="The first host's address for the others; its name by default.")] = "",
    max_failures: MaxFailures = 3,
    max_same_step: MaxSameStep = 2,
) -> None:
    """Train on several machines over ssh and restart after crashes; they must share this folder and the run's."""
    from launch.attempts import Limits
    from launch.ssh import launch_ssh

    code = launch_ssh(hostfile, config, overrides or [], Limits(max_failures, max_same_step), master)
    raise typer.Exit(code if code >= 0 else 128 - code)


@app.command()
def kubernetes(
    config: Config,
    overrides: Overrides = None,
    kind: Annotated[str, typer.Option(help="pytorchjob or jobset.")] = "pytorchjob",
    image: Annotated[str, typer.Option(help="Container image that has headrace installed.")] = "",
    name: Annotated[str, typer.Option(help="Name of the job; the run folder's name when not given.")] = "",
    namespace: Annotated[str, typer.Option(help="Kubernetes namespace.")] = "",
    nodes: Annotated[int, typer.Option(help="Pods.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs and processes of each pod; 0 for CPU pods.")] = 8,
    claim: Annotated[
        list[str] | None, typer.Option(metavar="/PATH=CLAIM", help="Mount a persistent volume claim.")
    ] = None,
    max_restarts: Annotated[int, typer.Option(help="Restarts of the whole run.")] = 10,
) -> None:
    """Print a PyTorchJob or JobSet for `kubectl apply -f -`."""
    from launch.kubernetes import PodRequest, render_kubernetes
    from launch.preflight import checked_config

    if kind not in ("pytorchjob", "jobset"):
        raise ConfigError(f"--kind {kind!r}: pytorchjob or jobset")
    run = checked_config(config, overrides or [], max(1, nodes) * max(1, gpus_per_node))
    pairs = [text.partition("=") for text in claim or []]
    if bad := next((path for path, _, volume in pairs if not volume), None):
        raise ConfigError(f"--claim {bad}: write /absolute/path=CLAIM")
    request = PodRequest(
        name=name or Path(run.run.dir).name,
        image=image,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        namespace=namespace,
        claims={path: volume for path, _, volume in pairs},
        max_restarts=max_restarts,
    )
    text = render_kubernetes("jobset" if kind == "jobset" else "pytorchjob", request, run)
    typer.echo(text.rstrip("\n"))


@app.command()
def slurm(
    config: Config,
    overrides: Overrides = None,
    nodes: Nodes = "1",
    gpus_per_node: GpusPerNode = "8",
    tasks_per_node: TasksPerNode = "0",
    spares: Spares = 0,
    partition: Partition = "",
    account: Account = "",
    time: Time = "24:00:00",
    job_name: JobName = "",
    container: Container = "",
    save_seconds: SaveSeconds = 120,
    chain: Annotated[int, typer.Option(help="Jobs to submit at once, one after the other.")] = 1,
    max_failures: MaxFailures = 3,
    max_same_step: MaxSameStep = 2,
    site: SiteFile = None,
    dry_run: DryRun = False,
) -> None:
    """Submit a run to SLURM, with a copy of code and configuration in the run folder."""
    from launch.request import SlurmRequest
    from launch.site import Site, load_site
    from launch.slurm import launch_slurm

    fewest, most = node_range(nodes)
    request = SlurmRequest(
        nodes=most,
        min_nodes=fewest,
        gpus_per_node=one_number("--gpus-per-node", gpus_per_node),
        tasks_per_node=one_number("--tasks-per-node", tasks_per_node),
        spares=spares,
        partition=partition,
        account=account,
        time=time,
        job_name=job_name,
        container=container,
        save_seconds=save_seconds,
        chain=chain,
        max_failures=max_failures,
        max_same_step=max_same_step,
    )
    done = launch_slurm(config, overrides or [], request, load_site(site) if site else Site(), dry_run)
    if dry_run:
        typer.echo(done.script.rstrip("\n"))
        return
    run_dir = done.snapshot.parents[1]
    typer.echo(f"submitted job {' '.join(done.jobs)}")
    typer.echo(f"  what happens:  headrace launch status {run_dir}")
    typer.echo(f"  output:        headrace launch logs {run_dir}   ({run_dir / 'log'})")
    typer.echo(f"  code and configuration as submitted: {done.snapshot}")


def node_range(text: str) -> tuple[int, int]:
    """`--nodes` 4 as (4, 4), 2-4 as (2, 4)."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if not found:
        raise ConfigError(
            f"--nodes {text!r}: give one number, or a range such as 2-4; nodes cannot differ in what they run"
        )
    fewest = int(found[1])
    if fewest < 1:
        raise ConfigError(f"--nodes: at least 1, got {text}")
    return fewest, int(found[2] or fewest)


def one_number(option: str, text: str) -> int:
    """`text` as the number that holds for every node; lists such as 4,8 are what SLURM calls heterogeneous."""
    if not text.isdecimal():
        raise ConfigError(
            f"{option} {text!r}: give one whole number that holds for every node; nodes cannot differ: every step ends "
            "with an exchange among all processes, so nodes with more GPUs would wait for the others"
        )
    return int(text)
