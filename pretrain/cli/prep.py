"""`headrace data prep`: filter, deduplicate and score raw documents before training."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table


def prep(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file: input, steps, out, executor.")],
) -> None:
    """Filter, deduplicate and score raw documents into files that a run can read; started again, it goes on."""
    from data_scheduler.prep.load import load_prep_config
    from data_scheduler.prep.run import prepare

    settings = load_prep_config(config)
    outcome = prepare(settings)
    if outcome.report is None:
        print(f"jobs submitted; the last one writes {settings.out}/prep_report.json")
        return
    if outcome.was_done:
        print(f"{settings.out} is complete; nothing to do")
    Console(width=None if sys.stdout.isatty() else 120, markup=False).print(_table(outcome.report, settings.out))


def _table(report: dict[str, Any], out: str) -> Table:
    table = Table("step", "documents in", "removed", "text removed", "most often because", title=f"prepared in {out}")
    read = ("read", report["records"], report["rejected"], 0, 0, {})
    steps = [
        (
            step["step"],
            step["documents_in"],
            step["documents_removed"],
            step["chars_in"],
            step["chars_removed"],
            step["reasons"],
        )
        for step in report["steps"]
    ]
    for name, documents, removed, chars, lost, reasons in [read, *steps]:
        often = max(reasons, key=lambda reason: (reasons[reason], reason)) if reasons else ""
        share = f"{lost / chars:.1%}" if chars and lost else ""
        table.add_row(name, f"{documents:,}", f"{removed:,}" if removed else "", share, often)
    table.add_row("out", f"{report['documents']:,}", "", "", f"{report['chars'] / 1e6:,.1f} M characters")
    return table
