"""`headrace train`: start a run or go on with it, or say what it would be."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from headrace.errors import ConfigError, ExitCode


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, e.g. train.steps=100.")
    ] = None,
    nproc: Annotated[int, typer.Option(min=1, help="Processes to start on this machine.")] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what the run would be (model, layout, memory); start nothing.")
    ] = False,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="With --dry-run: processes on all machines together.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print JSON.")] = False,
) -> None:
    """Train CONFIG; a run folder that holds a checkpoint is resumed from it.

    Under torchrun or SLURM (RANK and WORLD_SIZE set) this process is one of theirs; with --nproc N it starts N.
    """
    from pretrain.config import load_config

    if not dry_run and (world_size is not None or as_json):
        raise ConfigError("--world-size and --json belong to --dry-run; --nproc N starts N processes")
    run_config = load_config(config, overrides or [])
    if dry_run:
        import orjson

        from pretrain.dry_run import as_text, describe

        plan = describe(run_config, world_size or nproc)
        print(orjson.dumps(plan, option=orjson.OPT_INDENT_2).decode() if as_json else as_text(plan))
        raise typer.Exit(int(ExitCode.DONE))
    if nproc > 1 and "RANK" not in os.environ:
        from pretrain.processes import start_processes

        command = [sys.executable, "-m", "pretrain", "train", str(config), *(overrides or [])]
        code = start_processes(command, nproc, {}, Path(run_config.run.dir) / "log")
        raise typer.Exit(code if code >= 0 else int(ExitCode.RECOVERABLE))  # negative: killed by a signal
    from pretrain.train import train as run

    raise typer.Exit(int(run(run_config)))
