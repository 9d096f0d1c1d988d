"""`headrace report`: what a run did, as a table and a plot."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pretrain.report import Summary


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Where the plot goes; RUN/report.png when not given.")] = None,
    page: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write one HTML file too, with all plots in it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON instead of a table.")] = False,
) -> None:
    """Summarise RUN, finished or not, and draw its losses."""
    from pretrain.report import load_run, plot, summarise

    data = load_run(run)
    summary = summarise(data)
    picture = out or run / "report.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    plot(data, picture)
    if page is not None:
        from pretrain.report_html import write_html

        write_html(data, page)
    if as_json:
        typer.echo(summary.to_json())
    else:
        _print(summary, picture)


def _print(summary: "Summary", picture: Path) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from pretrain.progress import clock_time, short

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    state = "finished" if summary.finished else "not finished"
    console.print(f"[bold]{escape(summary.run)}[/bold]  {state}")
    facts = Table.grid(padding=(0, 2))
    for name, value in (
        ("steps", f"{summary.steps:,}"),
        ("tokens", f"{summary.tokens:,}"),
        ("time in steps", clock_time(summary.training_s)),
        ("speed", f"{short(summary.tokens_per_s)} tokens/s, {100 * summary.data_wait:.1f}% waiting for data"),
        ("training loss", f"{summary.first_loss:.4f} to {summary.last_loss:.4f} (mean of the last 20 steps)"),
        ("checkpoint", summary.checkpoint or "none"),
        ("plot", str(picture)),
    ):
        facts.add_row(name, escape(value))
    console.print(facts)
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("source", min_width=min(24, max((len(source.name) for source in summary.sources), default=6)))
    for heading in ("tokens", "share", "train loss", "val first", "val last", "val bits per byte", "val fall"):
        table.add_column(heading, justify="right")
    for source in summary.sources:
        table.add_row(
            escape(source.name),
            f"{source.tokens:,}",
            f"{100 * source.share:.1f}%",
            _loss(source.last_loss),
            _loss(source.first_val_loss),
            _loss(source.last_val_loss),
            _loss(source.last_val_bits_per_byte),
            "-" if source.fall is None else f"{100 * source.fall:.1f}%",
        )
    console.print(table)
    if summary.scores:
        scores = Table(show_edge=False, pad_edge=False, header_style="bold")
        scores.add_column("task")
        for heading in ("step", "value"):
            scores.add_column(heading, justify="right")
        for name, values in summary.scores.items():
            step, value = list(values.items())[-1]
            scores.add_row(escape(name), step, _loss(value))
        console.print(scores)


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
