"""`headrace convert`: checkpoints to and from other programs, compared, averaged and looked into."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Convert, compare, average and inspect checkpoints.", no_args_is_help=True)


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
    from pretrain.convert.new_run import model_section

    typer.echo(model_section(convert(folder, out)), nl=False)
    _say_how_to_train(folder, out, folder if (folder / "tokenizer.json").is_file() else None)


TokenizerOption = Annotated[Path | None, typer.Option(help="tokenizer.json or its folder, for the new run.")]
NewRunOption = Annotated[
    Path, typer.Option(help="Run folder to make; `headrace train CONFIG run.dir=OUT` starts from it.")
]


@app.command("from-megatron")
def from_megatron(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where Megatron-LM saved to.", show_default=False)],
    out: NewRunOption,
    tokenizer: TokenizerOption = None,
) -> None:
    """Make a run folder whose step 0 has the weights of a torch_dist checkpoint of Megatron-LM."""
    from pretrain.convert.megatron import from_megatron as convert
    from pretrain.convert.new_run import model_section

    typer.echo(model_section(convert(folder, out, tokenizer)), nl=False)
    _say_how_to_train(folder, out, tokenizer)


@app.command("to-megatron")
def to_megatron(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder to write; Megatron-LM's --load.")],
    step: Annotated[int | None, typer.Option(min=0, help="Step of the checkpoint; the newest when not given.")] = None,
) -> None:
    """Write a checkpoint of RUN for Megatron-LM: --load OUT --use-checkpoint-args --finetune."""
    from pretrain.convert.megatron import to_megatron as convert

    typer.echo(convert(run, step, out))


@app.command("from-nyonic")
def from_nyonic(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Nyonic's wonton .pt file.", show_default=False)],
    out: NewRunOption,
    heads: Annotated[int | None, typer.Option(min=1, help="Attention heads; of 128 when no tensor tells.")] = None,
    drop_output_bias: Annotated[
        bool, typer.Option("--drop-output-bias", help="Leave the head's bias out; the logits change.")
    ] = False,
    tokenizer: TokenizerOption = None,
) -> None:
    """Make a run folder whose step 0 has the weights of a public wonton checkpoint of Nyonic."""
    from pretrain.convert.new_run import model_section
    from pretrain.convert.nyonic import from_nyonic as convert

    typer.echo(model_section(convert(file, out, heads, drop_output_bias, tokenizer)), nl=False)
    _say_how_to_train(file, out, tokenizer)


@app.command("verify")
def verify(
    one: Annotated[Path, typer.Argument(metavar="A", help="Run or Hugging Face folder.", show_default=False)],
    other: Annotated[Path, typer.Argument(metavar="B", help="Another.", show_default=False)],
    tolerance: Annotated[float, typer.Option(min=0.0, help="Largest difference of two logits that passes.")] = 1e-4,
    text: Annotated[str | None, typer.Option(help="Text to compare on, instead of the built-in one.")] = None,
    step_a: Annotated[int | None, typer.Option(min=0, help="Step of A's checkpoint, when not the newest.")] = None,
    step_b: Annotated[int | None, typer.Option(min=0, help="Step of B's checkpoint, when not the newest.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer for both.")] = None,
) -> None:
    """Compare the logits of A and B on the same text, in float32; exit 1 when they differ by more than TOLERANCE."""
    from pretrain.convert.verify import TEXT
    from pretrain.convert.verify import verify as compare

    found = compare(one, other, TEXT if text is None else text, (step_a, step_b), tokenizer)
    same = found.difference <= tolerance  # NaN is never
    typer.echo(
        f"largest difference of two logits {found.difference:.3g} on {found.tokens} tokens (largest logit "
        f"{found.largest:.3g}, same next token after {found.same_choice} of {found.tokens}): "
        f"{'within' if same else 'beyond'} {tolerance:g}"
    )
    if not same:
        raise typer.Exit(1)


@app.command("average")
def average(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.", show_default=False)],
    out: NewRunOption,
    last: Annotated[int, typer.Option(min=2, help="How many of the newest checkpoints.")] = 3,
    ema: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Decay of a moving average; without it all weigh the same.")
    ] = None,
) -> None:
    """Average the weights of the newest checkpoints of RUN into step 0 of a new run folder."""
    from pretrain.convert.average import average as convert
    from pretrain.convert.new_run import model_section

    model, steps = convert(run, out, last, ema)
    typer.echo(model_section(model), nl=False)
    typer.echo(f"{out}: step 0 is the average of steps {', '.join(map(str, steps))} of {run}", err=True)


@app.command("inspect")
def inspect(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="Run, Hugging Face or torch_dist folder.", show_default=False)
    ],
    step: Annotated[int | None, typer.Option(min=0, help="Step of the checkpoint; the newest when not given.")] = None,
) -> None:
    """List the weights in a checkpoint: name, shape, type, NaN or infinite values; and count the parameters."""
    from pretrain.convert.inspect import inspect as look

    parameters = tensors = bad = 0
    for each in look(path, step):
        shape = " x ".join(map(str, each.shape))
        typer.echo(f"{each.name:<64} {shape:>20} {each.dtype:>9} {each.not_finite or '-':>6}")
        parameters, tensors, bad = parameters + each.numel, tensors + 1, bad + each.not_finite
    typer.echo(f"{tensors} tensors, {parameters:,} parameters, {bad} NaN or infinite values")


def _say_how_to_train(source: Path, out: Path, tokenizer: Path | None) -> None:
    and_tokenizer = "" if tokenizer is None else f" and data.tokenizer={tokenizer}"
    typer.echo(
        f"{out}: step 0 has the weights of {source}. Give CONFIG the model section above{and_tokenizer}, "
        f"then `headrace train CONFIG run.dir={out}`.",
        err=True,
    )
