"""`headrace metrics`: a run's numbers for other programs."""

from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(help="Hand a run's numbers to other programs.", no_args_is_help=True)


@app.callback()
def _group() -> None: ...


@app.command("export")
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.", show_default=False)],
    form: Annotated[Literal["parquet", "csv"], typer.Option("--format", help="What to write.")] = "parquet",
    out: Annotated[Path | None, typer.Option(help="Where it goes; RUN/metrics.FORMAT when not given.")] = None,
) -> None:
    """Write RUN's records as a table: a row a record, columns named as in the trackers."""
    from pretrain.metrics.export import export as write

    target = out or run / f"metrics.{form}"
    count = write(run, target, form)
    typer.echo(f"{count} records in {target}")
