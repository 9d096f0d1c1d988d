"""`headrace launch`: the commands."""

from pathlib import Path
from typing import Annotated

import typer

from headrace.errors import ConfigError

app = typer.Typer(help="Run on a SLURM cluster, or in several processes on this machine.", no_args_is_help=True)

Config = Annotated[Path, typer.Argument(help="The run's YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as train.steps=100.")
]


@app.command()
def local(
    config: Config,
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(help="Processes to start.")] = 1,
    max_restarts: Annotated[int, typer.Option(help="Restarts in a row without a new checkpoint.")] = 3,
) -> None:
    """Train on this machine in several processes and restart them after crashes."""
    from launch.local import launch_local

    code = launch_local(config, overrides or [], nproc, max_restarts)
    raise typer.Exit(code if code >= 0 else 128 - code)


@app.command()
def slurm(
    config: Config,
    overrides: Overrides = None,
    nodes: Annotated[str, typer.Option(help="Nodes.")] = "1",
    gpus_per_node: Annotated[str, typer.Option(help="GPUs and processes on each node; 0 for a CPU cluster.")] = "8",
    tasks_per_node: Annotated[str, typer.Option(help="Processes on each node of a CPU cluster.")] = "0",
    partition: Annotated[str, typer.Option(help="SLURM partition.")] = "",
    account: Annotated[str, typer.Option(help="SLURM account.")] = "",
    time: Annotated[str, typer.Option(help="Time limit of one job; the run goes on in the next.")] = "24:00:00",
    job_name: Annotated[str, typer.Option(help="Job name; the run folder's name when not given.")] = "",
    container: Annotated[str, typer.Option(help="Container image (needs pyxis on the cluster).")] = "",
    max_failures: Annotated[int, typer.Option(help="Failures in a row without a new checkpoint.")] = 3,
    site: Annotated[Path | None, typer.Option(help="YAML file with the cluster's own settings.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the job script, write and submit nothing.")] = False,
) -> None:
    """Submit a run to SLURM, with a copy of code and configuration in the run folder."""
    from launch.site import Site, load_site
    from launch.slurm import SlurmRequest, launch_slurm

    request = SlurmRequest(
        nodes=_one_number("--nodes", nodes),
        gpus_per_node=_one_number("--gpus-per-node", gpus_per_node),
        tasks_per_node=_one_number("--tasks-per-node", tasks_per_node),
        partition=partition,
        account=account,
        time=time,
        job_name=job_name,
        container=container,
        max_failures=max_failures,
    )
    answer = launch_slurm(config, overrides or [], request, load_site(site) if site else Site(), dry_run)
    typer.echo(answer.rstrip("\n") if dry_run else f"submitted job {answer}")


def _one_number(option: str, text: str) -> int:
    """`text` as the number that holds for every node; lists such as 4,8 are what SLURM calls heterogeneous."""
    if not text.isdecimal():
        raise ConfigError(f"{option} {text!r}: give one whole number that holds for every node; nodes cannot differ")
    return int(text)
