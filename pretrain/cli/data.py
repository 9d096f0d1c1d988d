"""`headrace data …`: make a sample corpus, look at a run's files ahead of it, and at what a run has been given."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from headrace.errors import ConfigError, DataError
from pretrain.cli.data_simulate import simulate
from pretrain.cli.prep import prep

app = typer.Typer(help="Sample corpus, preparation, index, simulate, replay, trace, ledger.", no_args_is_help=True)
app.command()(prep)
app.command()(simulate)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")]


@app.command()
def sample(
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    seed: Annotated[int, typer.Option(help="Seed of the generated sources.")] = 0,
) -> None:
    """Write a multi-source corpus of real text from what this Python installation carries; nothing is downloaded."""
    from data_scheduler.sample_corpus import write_sample_corpus

    table = Table("source", "format", "files", "documents", "held out", "MB", title=f"sample corpus in {out}")
    for source in write_sample_corpus(out, seed=seed):
        table.add_row(
            source.source,
            source.suffix,
            str(source.files),
            f"{source.documents:,}",
            f"{source.val_documents:,}",
            f"{source.bytes / 1e6:.1f}",
        )
    Console().print(table)


@app.command()
def index(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides.")] = None,
    copies: Annotated[bool, typer.Option("--copies", help="Make the copies of large files that a run would.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Look at every file of CONFIG's sources: how they will be cut, what is wrong with them.

    A run that follows opens no file twice. With --copies it also finds the copies that it needs.
    """
    from data_scheduler.curriculum import banded
    from data_scheduler.index_report import index_sources, make_copies
    from pretrain.config import load_config

    data = banded(load_config(config, overrides or []).data)
    found = list(index_sources(data))
    reports = [report for report, _ in found]
    if copies:
        for source, problem in make_copies(data, [unit for _, large in found for unit in large]):
            next(report for report in reports if report.source == source).problems.append(problem)
    if as_json:
        print(json.dumps({"lanes": data.lanes, "sources": [report.to_data() for report in reports]}))
        return
    table = Table(
        "source", "files", "MB", "text MB", "documents", "chunks", "chunk KB", "chunks per lane", "large",
        title=f"{config}, {data.lanes} lanes",
    )  # fmt: skip
    for report in reports:
        table.add_row(
            report.source,
            f"{report.files:,}",
            f"{report.bytes / 1e6:,.1f}",
            f"{report.text_bytes / 1e6:,.1f}",
            "" if report.documents is None else f"{report.documents:,}",
            f"{report.chunks:,}",
            f"{report.chunk_bytes / 1e3:,.1f}",
            f"{report.chunks_per_lane:,.1f}",
            f"{report.large_units:,}",
        )
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)
    for report in reports:
        for problem in report.problems:
            print(f"{report.source}: {problem}")


@app.command()
def replay(
    run: Run,
    steps: Annotated[str, typer.Option(metavar="A:B", help="First and last step, both included.")],
    sha256: Annotated[
        bool, typer.Option("--sha256", help="Compare with what `metrics.jsonl` recorded; exit code 3 if one differs.")
    ] = False,
) -> None:
    """Make past batches again from the raw files and print `step sha256`, as recorded in `metrics.jsonl`."""
    from data_scheduler.batch import batch_sha256
    from data_scheduler.replay import recorded_hashes
    from data_scheduler.replay import replay as replay_steps

    first, last = _parse_steps(steps)
    recorded, differing = recorded_hashes(run) if sha256 else {}, []
    for batch in replay_steps(run, first, last):
        found, before = batch_sha256(batch.digests), recorded.get(batch.step)
        print(batch.step, found, flush=True)
        if before not in (None, found):
            differing.append(batch.step)
    _say_if_untrained(run, last)
    if differing:
        raise DataError(
            f"{run}: {len(differing)} of the steps {steps} are not what was trained on, the first is {differing[0]}; "
            "has a data file changed without changing its size?"
        )


@app.command()
def trace(
    run: Run,
    step: Annotated[int, typer.Option(min=0, help="The step to look at.")],
    slot: Annotated[int | None, typer.Option(min=0, help="Only this slot of the global batch.")] = None,
    text: Annotated[bool, typer.Option("--text", help="Print the documents' text too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, with the documents' text.")] = False,
) -> None:
    """Name source, file, record and token range of every document in a past step's batch."""
    from data_scheduler.replay import trace as trace_step

    documents = trace_step(run, step, slot)
    _say_if_untrained(run, step)
    if as_json:
        for document in documents:
            print(json.dumps({"step": step, **document._asdict()}, ensure_ascii=False))
        return
    if text:
        for document in documents:
            print(
                f"== slot {document.slot}  {document.source}  {_printable(document.file)}  record {document.record}"
                f"  tokens {document.token_start}-{document.token_stop}"
            )
            print(_printable(document.text))
            if document.given is not None:
                print(f"given as (transforms): {_printable(document.given)}")
        return
    table = Table("slot", "source", "file", "record", "tokens", "begins with", title=f"step {step}")
    for document in documents:
        record = str(document.record)
        if document.within:
            record += f" of bytes {document.within[0]}-{document.within[1]}"
        table.add_row(
            str(document.slot),
            document.source,
            document.file,
            record,
            f"{document.token_start}-{document.token_stop}",
            repr(document.text[:40])[1:-1],
        )
    Console(width=None if sys.stdout.isatty() else 200, markup=False).print(table)


@app.command()
def ledger(
    run: Run,
    step: Annotated[
        int | None, typer.Option(min=0, help="After this many steps (default: the last checkpoint).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """What each source has given: tokens, share asked and realised, epochs, documents seen 0, 1, 2, … times."""
    from data_scheduler.replay import ledger as run_ledger

    at, rows = run_ledger(run, step)
    _say_if_untrained(run, at - 1)
    if as_json:
        print(json.dumps({"step": at, "sources": [row._asdict() for row in rows]}))
        return
    table = Table(
        "source", "sequences", "tokens", "asked", "realised", "epochs", "documents seen 0, 1, 2, … times",
        title=f"after {at} steps",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            row.source,
            f"{row.sequences:,}",
            f"{row.tokens:,}",
            f"{row.share_asked:.4f}",
            f"{row.share_realised:.4f}",
            f"{row.epochs:.2f}",
            ", ".join(f"{count:,}" for count in row.documents_seen),
        )
    Console().print(table)


def _say_if_untrained(run: Path, step: int) -> None:
    """A note when `metrics.jsonl` ends before `step`: the journal fixes that step too, until the plan is changed."""
    from data_scheduler.replay import recorded_hashes

    trained = max(recorded_hashes(run), default=step)
    if step > trained:
        sys.stderr.write(
            f"headrace: note: {run} has trained steps 0 to {trained}; later ones are shown as its plan stands now\n"
        )


def _printable(text: str) -> str:
    """The text with control characters spelled out: what is in a document must not steer the terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else repr(c)[1:-1] for c in text)


def _parse_steps(steps: str) -> tuple[int, int]:
    first, separator, last = steps.partition(":")
    try:
        begin = int(first)
        end = int(last) if separator else begin
    except ValueError:
        raise ConfigError(f"--steps {steps!r}: give A:B, two step numbers") from None
    return begin, end
