"""`headrace convert`: checkpoints to and from Hugging Face folders."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Convert checkpoints to and from Hugging Face.", no_args_is_help=True)


@app.command("to-hf")
def to_hf(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder to write; `from_pretrained` of transformers reads it.")],
    step: Annotated[int | None, typer.Option(min=0, help="Step of the checkpoint; the newest when not given.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json or its folder, when not where the run's configuration says.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a model that --out holds.")] = False,
) -> None:
    """Write a checkpoint of RUN as a Hugging Face model folder: weights, configuration and tokenizer."""
    from pretrain.convert.to_hf import to_hf as convert

    typer.echo(convert(run, step, out, tokenizer, force))


@app.command("from-hf")
def from_hf(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Hugging Face model folder.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Run folder to make; `headrace train CONFIG run.dir=OUT` starts from it.")],
) -> None:
    """Make a run folder whose step 0 has the weights of DIR, and print the `model` section CONFIG needs."""
    from pretrain.convert.from_hf import from_hf as convert
    from pretrain.convert.from_hf import model_section

    typer.echo(model_section(convert(folder, out)), nl=False)
    has_tokenizer = (folder / "tokenizer.json").is_file()
    tokenizer = f" and data.tokenizer={folder}" if has_tokenizer else ""
    typer.echo(
        f"{out}: step 0 has the weights of {folder}. Give CONFIG the model section above{tokenizer}, "
        f"then `headrace train CONFIG run.dir={out}`.",
        err=True,
    )
