"""`headrace mix`: what policies need before a run."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from headrace.errors import ConfigError, ExitCode

app = typer.Typer(help="Prepare what mixing policies need.", no_args_is_help=True)


@app.callback()
def _group() -> None: ...


@app.command("estimate-graph")
def estimate_graph(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[RUN]...", help="Finished runs on one source each: folder or metrics.jsonl."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="YAML", help="Make the runs: this configuration, once for each source.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of each run made.")] = None,
    threshold: Annotated[float, typer.Option(min=0.0, help="Weights below this become 0.")] = 0.0,
    nproc: Annotated[int, typer.Option(min=1, help="Processes of each run made.")] = 1,
    work: Annotated[
        Path | None,
        typer.Option(help="Where runs made are kept; next to OUT when not given. Finished ones are used again."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the graph goes.")] = Path("graph.json"),
) -> None:
    """Estimate the skills graph of policy `skill_it` from runs trained on one source each.

    Give finished runs, or --config and --steps to have them made, one after another, by `headrace train`.
    """
    from pretrain.skills_graph import estimate_graph as graph_of
    from pretrain.skills_graph import read_run

    if bool(runs) == (config is not None) or (config is None) != (steps is None):
        raise ConfigError("headrace mix estimate-graph: give finished runs, or --config with --steps")
    if config is not None:
        runs = _make_runs(config, steps or 1, nproc, work or out.with_suffix(".runs"))
    found = graph_of([read_run(run) for run in runs or []], threshold)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror or error}") from None
    _print(found, out)


def _make_runs(config: Path, steps: int, nproc: int, work: Path) -> list[Path]:
    """Train on each source alone. Raises ConfigError when a run does not come to its end."""
    from pretrain.config import load_config

    names = [source.name for source in load_config(config).data.sources]
    missing = [source.name for source in load_config(config).data.sources if not source.val_paths]
    if missing:
        raise ConfigError(f"{config}: a graph needs held-out data; set val_paths of {', '.join(missing)}")
    made = []
    for name in names:
        made.append(work / name)
        weights = [f"data.sources.{other}.weight={int(other == name)}" for other in names]
        # Limits and guard-rails are of the run that the graph is for.
        plain = [
            "data.policy={}",
            *(
                f"data.sources.{other}.{key}=null"
                for other in names
                for key in ("min_share", "max_share", "max_epochs")
            ),
        ]
        command = [
            sys.executable, "-m", "pretrain", "train", str(config), *weights, *plain,
            f"run.dir={made[-1]}", f"train.steps={steps}", "--nproc", str(nproc),
        ]  # fmt: skip
        print(f"training on {name} alone: {made[-1]}", flush=True)
        code = subprocess.run(command, check=False).returncode
        if code != int(ExitCode.DONE):
            raise ConfigError(f"the run on {name} ended with exit code {code}; the same command goes on with it")
    return made


def _print(found: dict[str, Any], out: Path) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"part of the held-out loss that {found['steps']:,} steps on a source take away")
    table.add_column("trained on")
    for name in found["sources"]:
        table.add_column(escape(name), justify="right")
    for name, row in zip(found["sources"], found["graph"], strict=True):
        table.add_row(escape(name), *(f"{weight:.4f}" for weight in row))
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)
    print(f"graph: {out}")
