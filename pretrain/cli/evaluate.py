"""`headrace eval`: what a trained model scores on tasks."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pretrain.evaluation.score import Outcome


def evaluate(
    model: Annotated[Path, typer.Argument(metavar="RUN", help="Run, or Hugging Face folder.", show_default=False)],
    tasks: Annotated[
        str,
        typer.Option(
            metavar="NAME,…",
            help="Tasks or groups of lm-eval: lambada, winogrande, hellaswag, piqa, race, boolq, belebele, xnli, "
            "xstorycloze, xwinograd, or a member such as belebele_deu_Latn; headrace_tiny is built in, data and all.",
        ),
    ],
    task_data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Local data: DIR/TASK/SPLIT.jsonl. Nothing is fetched from anywhere."),
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Solved examples before each question; as the task says if not given.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many questions of each task, the first.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences that the model reads at once.")] = 16,
    step: Annotated[int | None, typer.Option(min=0, help="Step of the checkpoint; the newest when not given.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer, when not where the run says.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the JSON report here too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of a table.")] = False,
) -> None:
    """Score a run's checkpoint, or a Hugging Face model, on tasks of lm-eval.

    Of a run, scores are kept in RUN/evaluations and, as `eval`, in its metrics.jsonl.
    """
    from pretrain.convert.loaded import is_hf_folder, load
    from pretrain.convert.stored_model import find_model
    from pretrain.evaluation.results import as_json as to_json
    from pretrain.evaluation.results import check_writable, record, report, write_report
    from pretrain.evaluation.score import import_lm_eval, score
    from pretrain.evaluation.task_files import find_tasks

    is_run = not is_hf_folder(model)
    done = int(find_model(model, step).meta["step"]) if is_run else None
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise typer.BadParameter("name one task at least", param_hint="--tasks")
    import_lm_eval()
    find_tasks(names, task_data, shots)  # a wrong name is told before a large model is read
    check_writable(model if is_run else None, out)
    outcome = score(load(model, step, tokenizer), names, task_data, shots, limit, batch_size)
    arguments = {"tasks": names, "shots": shots, "limit": limit, "batch_size": batch_size}
    content = report(outcome, str(model), done, arguments)
    # Kept and shown before anything can go wrong with --out.
    kept = record(outcome, model, done, content) if done is not None else out
    if as_json:
        typer.echo(to_json(content))
    else:
        _print(outcome, model, done)
    if out is not None:
        write_report(content, out)
    if kept is not None and not as_json:
        typer.echo(f"report: {kept}")


def _print(outcome: "Outcome", model: Path, step: int | None) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    console.print(f"[bold]{escape(str(model))}[/bold]" + ("" if step is None else f"  step {step}"))
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("task", no_wrap=True)
    table.add_column("metric", no_wrap=True)
    for heading in ("value", "± error", "shots", "questions"):
        table.add_column(heading, justify="right")
    for name, found in (*outcome.tasks.items(), *outcome.groups.items()):
        for metric, one in found.scores.items():
            cells: list[Any] = [f"{name} (mean of {len(found.members)})" if found.members else name, metric]
            cells += [_short(one.value), _short(one.standard_error)]
            cells.append("-" if found.shots is None else found.shots)
            whole = found.items == found.of_items
            cells.append(f"{found.items:,}" if whole else f"{found.items:,} of {found.of_items:,}")
            table.add_row(*(escape(str(cell)) for cell in cells))
    console.print(table)
    if outcome.cut:
        console.print(f"{outcome.cut:,} requests, longer than the model's longest sequence, lost their beginning")


def _short(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.3g}"
