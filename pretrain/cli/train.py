"""`headrace train`: start a run or go on with it."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from headrace.errors import ExitCode


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, e.g. train.steps=100.")
    ] = None,
    nproc: Annotated[int, typer.Option(min=1, help="Processes to start on this machine.")] = 1,
) -> None:
    """Train CONFIG; a run folder that holds a checkpoint is resumed from it.

    Under torchrun or SLURM (RANK and WORLD_SIZE set) this process is one of theirs; with --nproc N it starts N.
    """
    from pretrain.config import load_config

    run_config = load_config(config, overrides or [])
    if nproc > 1 and "RANK" not in os.environ:
        from pretrain.processes import start_processes

        command = [sys.executable, "-m", "pretrain", "train", str(config), *(overrides or [])]
        code = start_processes(command, nproc, {}, Path(run_config.run.dir) / "log")
        raise typer.Exit(code if code >= 0 else int(ExitCode.RECOVERABLE))  # negative: killed by a signal
    from pretrain.loop import train as run

    raise typer.Exit(int(run(run_config)))
