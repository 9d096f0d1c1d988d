"""`headrace sweep`: the command."""

from typing import Annotated

import typer

from launch import cli

app = typer.Typer(
    help="Submit many runs with different settings as one SLURM array job.",
    invoke_without_command=True,
    no_args_is_help=True,
    context_settings={"allow_interspersed_args": True},
)


@app.callback()
def sweep(
    config: cli.Config,
    overrides: cli.Overrides = None,
    vary: Annotated[list[str] | None, typer.Option(metavar="KEY=[A,B,...]", help="A key and its values.")] = None,
    at_once: Annotated[int, typer.Option(help="Runs at the same time; 0: as many as fit.")] = 0,
    nodes: cli.Nodes = "1",
    gpus_per_node: cli.GpusPerNode = "8",
    tasks_per_node: cli.TasksPerNode = "0",
    partition: cli.Partition = "",
    account: cli.Account = "",
    time: cli.Time = "24:00:00",
    job_name: cli.JobName = "",
    container: cli.Container = "",
    save_seconds: cli.SaveSeconds = 120,
    max_failures: cli.MaxFailures = 3,
    max_same_step: cli.MaxSameStep = 2,
    site: cli.SiteFile = None,
    dry_run: cli.DryRun = False,
) -> None:
    """Submit every combination of the values of --vary, each a run in its own folder inside run.dir."""
    from launch.request import SlurmRequest
    from launch.site import Site, load_site
    from launch.sweep import launch_sweep

    fewest, most = cli.node_range(nodes)
    request = SlurmRequest(
        nodes=most,
        min_nodes=fewest,
        gpus_per_node=cli.one_number("--gpus-per-node", gpus_per_node),
        tasks_per_node=cli.one_number("--tasks-per-node", tasks_per_node),
        partition=partition,
        account=account,
        time=time,
        job_name=job_name,
        container=container,
        save_seconds=save_seconds,
        max_failures=max_failures,
        max_same_step=max_same_step,
    )
    own = load_site(site) if site else Site()
    done = launch_sweep(config, overrides or [], vary or [], request, own, at_once, dry_run)
    if dry_run:
        typer.echo(done.script.rstrip("\n"))
        return
    folder = done.snapshot.parents[1]
    typer.echo(f"submitted array job {done.jobs[0]}; what each run is: {folder / 'sweep.json'}")
    typer.echo(f"  what happens:  headrace launch status {folder}")
