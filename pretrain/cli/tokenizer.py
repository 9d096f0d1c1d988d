"""`headrace tokenizer`: train a tokenizer on raw documents, and report how well one fits each source."""

import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from headrace.errors import ConfigError

app = typer.Typer(help="Train and examine tokenizers.", no_args_is_help=True)

_SHARD_NAME = re.compile(r"(train|val|valid|validation|test|part|shard|chunk|data)?[-_.]?\d*(-of-\d+)?", re.IGNORECASE)

Data = Annotated[
    list[str] | None,
    typer.Option("--data", help="Files, folders, globs or URLs of raw documents; repeat it, or list more after it."),
]
More = Annotated[list[str] | None, typer.Argument(help="More paths, as the shell expands a glob after --data.")]
TextKey = Annotated[str, typer.Option(help="Field (jsonl) or column (parquet) that holds the text.")]


@app.command()
def train(
    vocab_size: Annotated[int, typer.Option(help="Tokens in all, special tokens and space runs included.")],
    out: Annotated[Path, typer.Option(help="Folder to write tokenizer.json and tokenizer_config.json to.")],
    data: Data = None,
    more: More = None,
    text_key: TextKey = "text",
    max_bytes: Annotated[
        int | None,
        typer.Option(min=1, help="Read at most this much text, as equally from all --data paths as they allow."),
    ] = None,
    special_token: Annotated[
        list[str] | None,
        typer.Option(help="Another special token, such as <|fim_prefix|>, that no text can spell; may be repeated."),
    ] = None,
) -> None:
    """Train a byte-level BPE tokenizer: a token for each run of 2-24 spaces, single digits, every byte known."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from data_scheduler.tokenizer_training import train_tokenizer

    paths = _paths(data, more)
    texts = _balanced([_documents([path], text_key) for path in paths], max_bytes)
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading")

        def progress(documents: int, size: int) -> None:
            bar.update(task, description=f"read {documents:,} documents, {size / 1e6:,.1f} MB; then merging")

        trained = train_tokenizer(texts, vocab_size, out, progress, special_token or [])
    short = (
        "" if trained.vocab_size == vocab_size else f" (of {vocab_size:,} asked: the text has no more pairs to merge)"
    )
    typer.echo(
        f"{trained.path}: {trained.vocab_size:,} tokens{short} from {trained.documents:,} documents, "
        f"{trained.bytes / 1e6:,.1f} MB"
    )


@app.command()
def report(
    tokenizer: Annotated[
        str, typer.Argument(help="tokenizer.json, a folder that holds one, or a SentencePiece .model.")
    ],
    data: Data = None,
    more: More = None,
    compare: Annotated[list[str] | None, typer.Option("--compare", help="Another tokenizer; may be repeated.")] = None,
    text_key: TextKey = "text",
    max_bytes: Annotated[int, typer.Option(min=1, help="Text measured per source, from its front.")] = 1_000_000,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Compression rate, fertility and proportion of continued words per source, beside other tokenizers.

    A source is one --data path: `NAME=PATH`, a path named by its file or folder, or a run's config (all its sources).
    """
    from data_scheduler import tokenizer_report

    tokenizers = [tokenizer, *(compare or [])]
    segmenters = [tokenizer_report.load_segmenter(path) for path in tokenizers]
    sources = {
        name: tokenizer_report.take_bytes(_documents(paths, key), max_bytes)
        for name, (paths, key) in _sources(_paths(data, more), text_key).items()
    }
    for name, texts in sources.items():
        if not any(texts):
            raise ConfigError(f"--data {name}: no text in field {text_key!r}; check the path and --text-key")
    fits = tokenizer_report.report(segmenters, sources)
    if as_json:
        rows = {
            name: {
                path: {
                    "compression_rate": _number(fit.compression_rate),
                    "fertility": _number(fit.fertility),
                    "continued_words": _number(fit.continued),
                    "bytes": fit.bytes,
                    "tokens": fit.tokens,
                    "words": fit.words,
                }
                for path, fit in zip(tokenizers, row, strict=True)
            }
            for name, row in fits.items()
        }
        sizes = {path: segmenter.vocab_size for path, segmenter in zip(tokenizers, segmenters, strict=True)}
        typer.echo(json.dumps({"vocab_size": sizes, "sources": rows}, indent=2))
        return

    from rich.console import Console
    from rich.table import Table

    table = Table("source", "tokenizer", title="How the tokenizers fit", caption=_CAPTION, caption_justify="left")
    for heading in ("vocabulary", "bytes/token", "fertility", "continued words"):
        table.add_column(heading, justify="right")
    for name, row in fits.items():
        for path, segmenter, fit in zip(tokenizers, segmenters, row, strict=True):
            cells = f"{fit.compression_rate:.3f}", f"{fit.fertility:.3f}", f"{100 * fit.continued:.1f} %"
            table.add_row(name, path, f"{segmenter.vocab_size:,}", *cells, end_section=path == tokenizers[-1])
    Console(width=None if sys.stdout.isatty() else 160).print(table)


_CAPTION = (
    "bytes/token: compression rate, higher is better. fertility: tokens per word. continued words: share of words in "
    "two or more tokens (Rust et al. 2021, arXiv 2012.15613)."
)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _paths(data: list[str] | None, more: list[str] | None) -> list[str]:
    paths = [*(data or []), *(more or [])]
    if not paths:
        raise ConfigError("no --data given: name the files or folders with raw documents")
    return paths


def _documents(paths: list[str], text_key: str) -> Iterator[str]:
    """Every readable document behind `paths`; a path with nothing behind it raises ConfigError at once."""
    from data_scheduler.paths import expand
    from data_scheduler.reading import read_documents

    files = expand(paths, "--data")
    return (text for file, _ in files for text in read_documents(file, "auto", text_key))


def _balanced(streams: list[Iterator[str]], max_bytes: int | None) -> Iterator[str]:
    """Documents from the stream that gave the fewest bytes so far, until `max_bytes`; without a limit, all in turn."""
    if max_bytes is None:
        for stream in streams:
            yield from stream
        return
    given = dict.fromkeys(range(len(streams)), 0)
    total = 0
    while given and total < max_bytes:
        index = min(given, key=lambda i: (given[i], i))
        text = next(streams[index], None)
        if text is None:
            del given[index]
            continue
        size = len(text.encode("utf-8", "replace"))
        given[index] += size
        total += size
        yield text


def _sources(paths: list[str], text_key: str) -> dict[str, tuple[list[str], str]]:
    """Name -> (paths, text key). Paths of the same name are one source."""
    sources: dict[str, tuple[list[str], str]] = {}
    for path in paths:
        if path.endswith((".yaml", ".yml")):
            from pretrain.config import load_config

            for source in load_config(path).data.sources:
                sources[source.name] = (list(source.paths), source.text_key)
            continue
        name, equals, rest = path.partition("=")
        if not equals or "/" in name or Path(path).exists():
            name, rest = _source_name(path), path
        sources.setdefault(name, ([], text_key))[0].append(rest)
    return sources


def _source_name(path: str) -> str:
    """The file's or folder's name without suffixes; a shard's name says nothing, so there it is the folder's."""
    place = Path(path.rstrip("/"))
    stem = place.name.split(".")[0]
    is_shard = "*" in stem or (not place.is_dir() and _SHARD_NAME.fullmatch(stem) is not None)
    return place.absolute().parent.name if is_shard else stem or path
