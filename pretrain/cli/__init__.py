"""The `headrace` command. Each file here adds one group of commands; other packages add theirs through entry points.

Heavy packages (torch, megatron-core) are imported inside the commands that need them, so that `headrace --help` and the
data commands start in a fraction of a second.
"""

import errno
import sys
from importlib.metadata import entry_points
from typing import Any, NoReturn

import typer

from headrace.errors import ExitCode, HeadraceError
from headrace.version import __version__
from pretrain.cli import (
    config,
    convert,
    ctl,
    dashboard,
    data,
    doctor,
    evaluate,
    generate,
    metrics,
    mix,
    report,
    tokenizer,
    train,
)

app = typer.Typer(
    name="headrace",
    help="Pretrain language models with an online data scheduler.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command(name="train", context_settings={"allow_interspersed_args": True})(train.train)
app.command(name="generate")(generate.generate)
app.command(name="eval")(evaluate.evaluate)
app.command(name="report")(report.report)
app.command(name="doctor")(doctor.doctor)
app.command(name="dashboard")(dashboard.dashboard)
app.add_typer(ctl.app, name="ctl")
app.add_typer(data.app, name="data")
app.add_typer(tokenizer.app, name="tokenizer")
app.add_typer(config.app, name="config")
app.add_typer(convert.app, name="convert")
app.add_typer(mix.app, name="mix")
app.add_typer(metrics.app, name="metrics")
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


_UsageError: Any = typer.BadParameter.__base__
"""Base of what typer raises for a wrong command line; it lives in click or in typer itself, by typer's version."""

_THEIRS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.ENAMETOOLONG, errno.ELOOP}
    | {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}
)
"""What goes wrong with a disk or a path is the user's to mend; any other OSError is our bug and keeps its traceback."""


def main() -> None:
    """Run the command line; a mistake of the user becomes one line on stderr and its exit code."""
    try:
        code = app(prog_name="headrace", standalone_mode=False)
    except HeadraceError as error:
        _fail(str(error), int(error.exit_code))
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            sys.exit(int(ExitCode.USER_ERROR))
        command = error.ctx.command_path if error.ctx else "headrace"
        _fail(f"{error.format_message()} (see `{command} --help`)", int(ExitCode.USER_ERROR))
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        sys.exit(int(ExitCode.DONE))
    except OSError as error:
        if error.errno not in _THEIRS:
            raise
        _fail(f"{error.filename or 'write'}: {error.strerror}", int(ExitCode.USER_ERROR))
    if code == 130:
        sys.stderr.write("headrace: interrupted\n")
    sys.exit(code)


def _fail(message: str, code: int) -> NoReturn:
    sys.stderr.write(f"headrace: error: {' '.join(message.splitlines())}\n")
    sys.exit(code)
