"""`headrace launch status`, `logs`, `cancel`, `attach`: the commands about what was launched."""

import os
from pathlib import Path
from typing import Annotated

import typer

from headrace.errors import ConfigError

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, or the folder of a sweep.", show_default=False)]


def status(run: Run) -> None:
    """Say how a launched run stands; the exit code is the run's when a failure has ended it, else 0."""
    from launch.jobs import as_text, is_sweep, status_of, sweep_runs

    if not is_sweep(run):
        found = status_of(run)
        typer.echo(as_text(found))
        raise typer.Exit(found.exit_code)
    code = 0
    for folder, settings in sweep_runs(run):
        said = ", ".join(f"{key}={value}" for key, value in settings.items())
        if not (folder / "launch" / "attempts.jsonl").exists():
            typer.echo(f"{folder.name}  not started  {said}")
            continue
        found = status_of(folder)
        step = "-" if found.step is None else str(found.step + 1)
        typer.echo(f"{folder.name}  {found.word}  step {step}  {said}")
        code = code or found.exit_code
    raise typer.Exit(code)


def logs(
    run: Run,
    rank: Annotated[list[int] | None, typer.Option(help="Only this rank; may be given several times.")] = None,
    last: Annotated[int, typer.Option(help="Lines from the end; 0: all.")] = 20,
    merge: Annotated[bool, typer.Option("--merge", help="Put the lines of all ranks in order of time.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Go on with new lines until the run ends.")] = False,
) -> None:
    """Show what the ranks and the job script wrote."""
    from launch import logs as of
    from launch.jobs import status_of

    if last < 0:
        raise ConfigError(f"--last: at least 0, got {last}")
    files = of.log_files(run, rank)
    for line in of.merged(files, last) if merge else of.one_after_the_other(files, last):
        typer.echo(line)
    if follow:
        over = ("finished", "stopped", "given up")
        for line in of.follow(lambda: of.log_files(run, rank), lambda: status_of(run).word in over):
            typer.echo(line)


def cancel(
    run: Run, now: Annotated[bool, typer.Option("--now", help="Do not wait until the run has saved.")] = False
) -> None:
    """End a run: it saves and leaves, and nothing starts it again. `headrace launch` goes on from there."""
    from launch.jobs import cancel as end

    typer.echo(end(run, now))


def attach(
    run: Run, node: Annotated[str, typer.Option(help="Node of the job; its first when not given.")] = ""
) -> None:
    """Open a shell inside the running SLURM job of a run."""
    from launch.jobs import attach_command

    command = attach_command(run, node)
    os.execvp(command[0], command)
