"""`headrace generate`: text from a trained model."""

import sys
from pathlib import Path
from typing import Annotated

import typer


def generate(
    model: Annotated[Path, typer.Argument(metavar="RUN", help="Run, or Hugging Face folder.", show_default=False)],
    prompt: Annotated[str, typer.Option(help="Text to go on with; `-` reads it from standard input.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens, or at the document's end.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy: the likeliest token, always.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Choose among so many of the likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Choose among the likeliest that have this probability together.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same text.")] = 0,
    step: Annotated[int | None, typer.Option(min=0, help="Step of the checkpoint; the newest when not given.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer, when not where the run says.")] = None,
) -> None:
    """Continue a prompt with a run's checkpoint or a Hugging Face model; tokens appear as they come."""
    from pretrain.convert.loaded import load
    from pretrain.generate import Sampling
    from pretrain.generate import generate as write_on

    sampling = Sampling(temperature, top_k, top_p, seed)
    text = sys.stdin.read() if prompt == "-" else prompt
    loaded = load(model, step, tokenizer)
    typer.echo(text, nl=False)

    def show(part: str) -> None:
        sys.stdout.write(part)
        sys.stdout.flush()

    write_on(loaded, text, max_tokens, sampling, show)
    typer.echo()
