"""`headrace dashboard`: runs in a browser, while they train."""

from pathlib import Path
from typing import Annotated

import typer


def dashboard(
    runs: Annotated[Path, typer.Argument(metavar="RUNS_DIR", help="Folder that the runs are in, or one run's.")],
    host: Annotated[str, typer.Option(help="Address to listen on; any besides loopback needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8420,
    token_file: Annotated[
        str | None,
        typer.Option(help="File with the token that viewers must give, chmod 600; runs can then be changed."),
    ] = None,
    token: Annotated[
        str, typer.Option(envvar="HEADRACE_DASHBOARD_TOKEN", help="The token itself; better in the variable.")
    ] = "",
    beside: Annotated[
        int | None, typer.Option(hidden=True, help="End when this process is no longer the parent.")
    ] = None,
) -> None:
    """Show the runs below RUNS_DIR in a browser: losses, data, dynamics, system; with a token also change them."""
    from pretrain.control.server import read_token
    from pretrain.monitor.serve import serve, stay_beside

    if token_file is not None:
        token = read_token(token_file)
    if beside is not None:
        stay_beside(beside)
    serve(runs, host, port, token, lambda address: print(f"dashboard of {runs}: {address}", flush=True))
