"""`headrace ctl RUN …`: change a run while it goes on."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from headrace.errors import ConfigError, ExitCode

app = typer.Typer(
    help="Change a live run: mixture, policy, learning rate, sources; save, pause, stop, undo.", no_args_is_help=True
)
Why = Annotated[str, typer.Option(help="Why; for those who read the journal.")]
Timeout = Annotated[float, typer.Option(min=0.0, help="Seconds to wait for the answer.")]
At = Annotated[
    str | None, typer.Option(metavar="STEP|+N", help="First step; +N: N steps from now. Default: as soon as can be.")
]
Options = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Options; values are YAML.")]


class _Run(NamedTuple):
    """The run that is asked, and how."""

    run: str
    http: bool
    token_file: str | None
    ca: Path | None
    as_json: bool


@app.callback()
def _run(
    context: typer.Context,
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run folder, or URL of the endpoint.")],
    http: Annotated[bool, typer.Option("--http", help="Ask the endpoint named in RUN/control/endpoint.json.")] = False,
    token_file: Annotated[str | None, typer.Option(help="File with the token, for a URL.")] = None,
    ca: Annotated[Path | None, typer.Option(help="Certificates to trust, for https.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as one JSON object.")] = False,
) -> None:
    context.obj = _Run(run, http, token_file, ca, as_json)


@app.command()
def set_mix(
    context: typer.Context,
    shares: Annotated[list[str], typer.Argument(metavar="SOURCE=SHARE...", help="On any scale; the others get none.")],
    at: At = None,
    over: Annotated[int | None, typer.Option(min=2, help="Steps of a linear ramp to it.")] = None,
    why: Why = "",
    timeout: Timeout = 60.0,
) -> None:
    """Set the mixture: `set-mix web=0.5 code=0.5`. It holds until it is undone or a policy is set."""
    weights = {}
    for share in shares:
        name, equals, text = share.partition("=")
        try:
            weights[name] = float(text)
        except ValueError:
            equals = ""
        if not equals:
            raise ConfigError(f"{share!r}: write SOURCE=SHARE, e.g. web=0.5")
    _ask(context, {"command": "set-mix", "weights": weights, "at": at, "over": over}, why, timeout)


@app.command()
def set_policy(
    context: typer.Context,
    kind: Annotated[str, typer.Argument(help="Name of a policy.")],
    options: Options = None,
    at: At = None,
    why: Why = "",
    timeout: Timeout = 60.0,
) -> None:
    """Let a policy set the mixture, from its initial state on."""
    from headrace.yaml_file import parse_yaml

    given = {}
    for option in options or []:
        key, equals, text = option.partition("=")
        if not equals:
            raise ConfigError(f"{option!r}: write KEY=VALUE")
        given[key] = _plain(parse_yaml(text), option)
    _ask(context, {"command": "set-policy", "kind": kind, "options": given, "at": at}, why, timeout)


@app.command()
def set_lr_scale(
    context: typer.Context,
    scale: Annotated[float, typer.Argument(help="Factor on the schedule's learning rate.")],
    at: At = None,
    why: Why = "",
    timeout: Timeout = 60.0,
) -> None:
    """Multiply the learning rate."""
    _ask(context, {"command": "set-lr-scale", "scale": scale, "at": at}, why, timeout)


@app.command()
def set_eval_every(
    context: typer.Context,
    every: Annotated[int, typer.Argument(min=0, help="Steps; 0: not before the end.")],
    why: Why = "",
    timeout: Timeout = 60.0,
) -> None:
    """Evaluate held-out data every so many steps."""
    _ask(context, {"command": "set-eval-every", "every": every}, why, timeout)


@app.command()
def save_now(context: typer.Context, why: Why = "", timeout: Timeout = 60.0) -> None:
    """Write a checkpoint before the next step."""
    _ask(context, {"command": "save-now"}, why, timeout)


@app.command()
def stop_at(
    context: typer.Context,
    step: Annotated[str, typer.Argument(metavar="STEP|+N", help="Steps done by then; +N: N from now.")],
    why: Why = "",
    timeout: Timeout = 60.0,
) -> None:
    """Save and end once STEP steps are done; `headrace train` goes on from there."""
    _ask(context, {"command": "stop-at", "at": step}, why, timeout)


@app.command()
def quarantine(
    context: typer.Context,
    what: Annotated[
        str, typer.Argument(metavar="SOURCE[:FILE[:RECORD[@BEGIN-END]]]", help="What is not to be drawn any more.")
    ],
    why: Why = "",
    timeout: Timeout = 60.0,
) -> None:
    """Draw nothing from a source, a file or a record any more; `undo` lets it in again.

    Files and records are named as `headrace data trace` names them: `12 of bytes 0-8192` is `12@0-8192`.
    """
    source, _, rest = what.partition(":")
    command: dict[str, Any] = {"source": source, "file": rest or None}
    if found := re.fullmatch(r"(.+):([0-9]+)(?:@([0-9]+)-([0-9]+))?", rest):  # URLs have colons too
        file, record, *within = found.groups()
        command |= {"file": file, "record": int(record)}
        command |= {"within": [int(edge) for edge in within]} if within[0] else {}
    _ask(context, {"command": "quarantine", **command}, why, timeout)


@app.command()
def add_source(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML: one item of data.sources.")],
    why: Why = "",
    timeout: Timeout = 60.0,
) -> None:
    """Let a source enter the run; its paths are those that the run's machines see."""
    import yaml

    from headrace.yaml_file import parse_yaml

    try:
        source = parse_yaml(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: not valid YAML: {getattr(error, 'problem', error)}") from None
    _ask(context, {"command": "add-source", "source": _plain(source, str(file))}, why, timeout)


@app.command()
def pause(context: typer.Context, why: Why = "", timeout: Timeout = 60.0) -> None:
    """Wait before the next step, with everything in memory."""
    _ask(context, {"command": "pause"}, why, timeout)


@app.command()
def resume(context: typer.Context, why: Why = "", timeout: Timeout = 60.0) -> None:
    """Go on after a pause."""
    _ask(context, {"command": "resume"}, why, timeout)


@app.command()
def undo(
    context: typer.Context,
    event: Annotated[int, typer.Argument(min=0, help="Number of the event, as `status` shows it.")],
    why: Why = "",
    timeout: Timeout = 60.0,
) -> None:
    """Take back what an event set, from now on; what held before holds again."""
    _ask(context, {"command": "undo", "event": event}, why, timeout)


@app.command()
def status(context: typer.Context, timeout: Timeout = 60.0) -> None:
    """Where the run stands, and what people have changed."""
    _ask(context, {"command": "status"}, "", timeout)


def _ask(context: typer.Context, command: dict[str, Any], why: str, timeout: float) -> None:
    from pretrain.control.client import ByFile, ByHttp, Way, ask
    from pretrain.control.server import read_token

    at: _Run = context.obj
    way: Way
    if "://" in at.run:
        if at.token_file is None:
            raise ConfigError(f"{at.run}: give the file with the endpoint's token as --token-file")
        way = ByHttp(at.run, read_token(at.token_file), at.ca)
    else:
        way = ByHttp.of_run(Path(at.run), at.ca) if at.http else ByFile(Path(at.run))
    answer = ask(way, command, why, timeout)
    if at.as_json:
        print(json.dumps(answer))
    elif answer["status"] == "accepted":
        print(f"accepted: event {answer['event']} ({answer['kind']}), from step {answer['step']} on")
    elif answer["status"] == "ok":
        _show(answer)
    if answer["status"] == "refused":
        if not at.as_json:
            typer.echo(f"headrace: refused: {_printable(answer['reason'])}", err=True)
        raise typer.Exit(int(ExitCode.USER_ERROR))


def _show(status: dict[str, Any]) -> None:
    shares = status["mixture"]
    total = sum(shares.values()) or 1.0
    print(f"step {status['step']} of {status['steps']} is next, {status['tokens']:,} tokens done")
    print("paused" if status["paused"] else f"data can change from step {status['earliest_change']} on")
    mixture = " ".join(f"{name}={share / total:.4g}" for name, share in shares.items())
    print(f"mixture, decided by {status['decided_by']}: {mixture}")
    for key in ("quarantined", "lr_scale", "eval_every", "stop_at"):
        if status[key] not in (None, []):
            print(f"{key}: {', '.join(status[key]) if key == 'quarantined' else status[key]}")
    for change in status["changes"]:
        note = " (undone)" if change["undone"] else ""
        why = f": {_printable(change['why'])}" if change["why"] else ""
        print(f"event {change['event']}, step {change['step']}: {change['kind']} by {change['by']}{why}{note}")


def _printable(text: str) -> str:
    """The text with control characters spelled out: what others wrote must not steer the terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _plain(value: Any, where: str) -> Any:
    """`value` as JSON data. Raises ConfigError for YAML's dates and the like."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from None
