"""`headrace config …`: look at configurations."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Show a resolved configuration, or its schema.", no_args_is_help=True)


@app.command()
def show(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides.")] = None,
) -> None:
    """Print the configuration with every default filled in, after validation."""
    from pretrain.config import dump_config, load_config

    print(dump_config(load_config(config, overrides or [])), end="")


@app.command()
def schema() -> None:
    """Print the JSON schema of a run's configuration; editors complete and check YAML with it."""
    from pretrain.config import config_schema

    print(config_schema())
