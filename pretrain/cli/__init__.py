"""The `headrace` command. Each file here adds one group of commands; other packages add theirs through entry points.

Heavy packages (torch, megatron-core) are imported inside the commands that need them, so that `headrace --help` and the
data commands start in a fraction of a second.
"""

import sys
from importlib.metadata import entry_points

import typer

from headrace.errors import ExitCode, HeadraceError
from headrace.version import __version__
from pretrain.cli import config, convert, data, doctor, mix, report, tokenizer, train

app = typer.Typer(
    name="headrace",
    help="Pretrain language models with an online data scheduler.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command(name="train", context_settings={"allow_interspersed_args": True})(train.train)
app.command(name="report")(report.report)
app.command(name="doctor")(doctor.doctor)
app.add_typer(data.app, name="data")
app.add_typer(tokenizer.app, name="tokenizer")
app.add_typer(config.app, name="config")
app.add_typer(convert.app, name="convert")
app.add_typer(mix.app, name="mix")
for plugin in sorted(entry_points(group="headrace.commands"), key=lambda entry: entry.name):
    app.add_typer(plugin.load(), name=plugin.name)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"headrace {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None: ...


def main() -> None:
    """Run the command line; a HeadraceError becomes one line on stderr and its exit code."""
    try:
        app()
    except HeadraceError as error:
        sys.stderr.write(f"headrace: error: {error}\n")
        sys.exit(int(error.exit_code))
    except KeyboardInterrupt:
        sys.stderr.write("headrace: interrupted\n")
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(int(ExitCode.DONE))
    except OSError as error:
        # A full disk or a read-only folder is the user's to mend; everything else keeps its traceback.
        import errno

        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        sys.stderr.write(f"headrace: error: {error.filename or 'write'}: {error.strerror}\n")
        sys.exit(int(ExitCode.USER_ERROR))
