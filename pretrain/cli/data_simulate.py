"""`headrace data simulate`: what a run will draw from each source, before it is started."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headrace.errors import ConfigError

if TYPE_CHECKING:
    from data_scheduler.assumed_losses import RecordedLosses
    from data_scheduler.simulate import Simulation, SourceOutcome
    from data_scheduler.token_estimate import TokenEstimate


def simulate(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, of a run or of its data section alone.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps to simulate; train.steps when not given.")] = None,
    losses: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Run folder or metrics.jsonl whose losses a policy that listens is told."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the plot goes.")] = Path("simulation.png"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of the table.")] = False,
) -> None:
    """Say and plot what a run of CONFIG will draw from each source: shares exactly, epochs as estimates.

    Reads file sizes and some 256 KB of every source; nothing else, and no model.
    """
    from data_scheduler.curriculum import banded
    from data_scheduler.dry_run import DryRun
    from data_scheduler.simulate import estimate_sources
    from data_scheduler.simulate import simulate as simulate_steps
    from pretrain.config import load_data_config
    from pretrain.simulation_plot import plot_simulation

    data, configured = load_data_config(config, overrides or [])
    data = banded(data)
    number = steps or configured
    if number is None:
        raise ConfigError(f"{config} has no train.steps; give --steps N")
    recorded = None if losses is None else _recorded(losses, [source.name for source in data.sources])
    DryRun(
        data, losses=recorded, run_steps=number
    )  # says what is wrong with policy and weights before any file is looked at
    simulation = simulate_steps(data, estimate_sources(data), number, recorded)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        plot_simulation(simulation, out)
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror or error}") from None
    if as_json:
        print(json.dumps(simulation.to_data() | {"plot": str(out)}, allow_nan=False, ensure_ascii=False))
    else:
        _print(simulation, config, out)


def _recorded(path: Path, names: list[str]) -> "RecordedLosses":
    """The losses of an earlier run. Raises ConfigError when there are none."""
    from data_scheduler.assumed_losses import RecordedLosses
    from pretrain.metrics import read_records
    from pretrain.metrics.registry import is_evaluation

    file = path / "metrics.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"--losses {path}: no metrics.jsonl there; give a run folder or such a file")

    def found() -> Iterator[tuple[int, dict[str, float]]]:
        for record in read_records(file):
            given = record.get("source_loss")
            if isinstance(given, dict) and not is_evaluation(record):
                yield record["step"], {name: loss for name, loss in given.items() if isinstance(loss, int | float)}

    return RecordedLosses(found(), names, str(path))


def _print(simulation: "Simulation", config: Path, picture: Path) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    table = Table(
        title=escape(
            f"{config}: {simulation.steps:,} steps of {simulation.said_shape} tokens, policy {simulation.policy}"
        )
    )
    table.add_column("source")
    for heading in (
        "weight",
        "asked",
        "realised",
        "sequences",
        "tokens",
        "tokens in an epoch",
        "epochs",
        "passes 1, 2, 4, … at step",
        "through at",
    ):
        table.add_column(heading, justify="right")
    for source in simulation.sources:
        table.add_row(
            escape(source.source),
            f"{source.weight:g}",
            f"{source.share_asked:.4f}",
            f"{source.share_realised:.4f}",
            f"{source.sequences:,}",
            f"{source.tokens:,}",
            _per_epoch(source.estimate),
            _epochs(source),
            ", ".join(f"{step:,}" for step in source.epochs_passed.values()) or "-",
            "-" if source.end is None else f"{source.end.through:,}",
        )
    console.print(table)
    print(f"no source was ever off by more than {simulation.most_owed:.3f} sequences")
    for line in (*simulation.notes, *(f"warning: {warning}" for warning in simulation.warnings())):
        print(line)
    rests_on: dict[str, list[str]] = {}
    for source in simulation.sources:
        rests_on.setdefault(source.estimate.why, []).append(source.source)
    for why, names in rests_on.items():
        print(f"tokens in an epoch of {', '.join(names)}: {why}")
    print(f"plot: {picture}")


def _per_epoch(estimate: "TokenEstimate") -> str:
    if not estimate.tokens:
        return "?"
    if math.isinf(estimate.error):
        return f"{estimate.tokens:,.0f} ±?"
    return f"{estimate.tokens:,.0f}" + (f" ±{100 * estimate.error:.1f} %" if estimate.error else "")


def _epochs(source: "SourceOutcome") -> str:
    if source.epochs is None:
        return "?"
    limit = "" if source.max_epochs is None else f" of {source.max_epochs}"
    off = "" if not source.epochs_error else f" ±{source.epochs_error:.2f}"
    return f"{source.epochs:.2f}{off}{limit}"
