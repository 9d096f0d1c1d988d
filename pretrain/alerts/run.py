"""Rank 0's side of the alerts: what it says to the courier, without ever waiting for it.

    with alerting(config, usable_hooks(config), is_first_rank) as alerts:
        sinks = [*sinks, alerts.sink(journal)]      # beats, and what records and the journal show
        ...                                         # an exception that passes is told
        alerts.ended(code)

A line that finds the pipe full is dropped: 64 KB are hundreds of beats, and a courier so far behind is not well.
"""

import contextlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_scheduler.journal import Event, Journal
from headrace.errors import CheckpointError, ConfigError, ExitCode
from pretrain.config import RunConfig
from pretrain.config.alerts import AlertsConfig, Hook
from pretrain.metrics.registry import Record, is_evaluation

log = logging.getLogger(__name__)
_START = "import sys; sys.path.insert(0, sys.argv[1]); from pretrain.alerts.courier import main; main()"
"""From where this package is; in the trainer's folder and environment, which are those of a command hook too."""


class Alerts:
    """The pipe to the courier. Without hooks, and on other ranks, it does nothing."""

    def __init__(self, config: AlertsConfig, run_dir: Path, run_name: str, enabled: bool = True) -> None:
        self._linger_s = config.linger_s
        self._pipe = -1
        self._courier: subprocess.Popen[bytes] | None = None
        self.step = 0
        """Next step, as last told."""
        if not enabled or not config.hooks:
            return
        first = config.model_dump(mode="json") | {
            "run": run_name or run_dir.resolve().name,
            "log": str(run_dir.resolve() / "log" / "alerts.jsonl"),
        }
        try:
            self._start(run_dir / "log", json.dumps(first).encode() + b"\n")
        except OSError as error:
            log.warning("alerts: the process that sends them cannot start (%s); training goes on without", error)

    def _start(self, folder: Path, first: bytes) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "alerts.log").open("ab") as errors:
            self._courier = subprocess.Popen(
                [sys.executable, "-c", _START, str(Path(__file__).parents[2])],
                stdin=subprocess.PIPE,
                stdout=errors,
                stderr=errors,
                bufsize=0,
                start_new_session=True,  # Ctrl-C and a launcher's signals are for the trainer
            )
        assert self._courier.stdin is not None
        self._courier.stdin.write(first)
        self._pipe = self._courier.stdin.fileno()
        os.set_blocking(self._pipe, False)

    def beat(self, step: int) -> None:
        """The run makes progress; `step` is the next one."""
        self.step = step
        self._say({"step": step})

    def tell(self, event: str, text: str) -> None:
        """Something happened. `event`: one of `pretrain.config.alerts.EventName`."""
        # Cut so that the line fits a pipe's atomic write of 4,096 bytes: a part of a line is worse than none.
        self._say({"event": event, "step": self.step, "text": text.strip()[:500]})

    def sink(self, journal: Journal) -> "AlertSink":
        """A sink that tells of what records and the journal's new events show."""
        return AlertSink(self, journal)

    def ended(self, code: ExitCode) -> None:
        """The run has left its loop in good order; nothing is told of one that had nothing to do."""
        if not self.step:
            return
        if code == ExitCode.DONE:
            self.tell("run_finished", f"{self.step} steps are done")
        else:
            self.tell("run_stopped", "saved; the same command goes on from there")

    def failed(self, error: BaseException) -> None:
        """The run ends by `error`."""
        text = next(iter(str(error).strip().splitlines()), "")
        if isinstance(error, CheckpointError):
            self.tell("checkpoint_failed", text)
        self.tell("run_failed", f"{type(error).__name__}: {text}" if text else type(error).__name__)

    def close(self) -> None:
        """Let the courier finish; waits for it, `linger_s` at most."""
        if self._courier is None:
            return
        self._say({"over": True})
        courier, self._courier, self._pipe = self._courier, None, -1
        assert courier.stdin is not None
        courier.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            courier.wait(self._linger_s + 1.0)  # it ends by itself

    def _say(self, what: dict[str, Any]) -> None:
        if self._pipe >= 0:
            with contextlib.suppress(BlockingIOError, BrokenPipeError):
                os.write(self._pipe, json.dumps(what).encode() + b"\n")


class AlertSink:
    """Reads records as they come, and the journal behind them."""

    def __init__(self, alerts: Alerts, journal: Journal) -> None:
        self._alerts, self._journal, self._seen = alerts, journal, len(journal.events)
        self._was_finite = True

    def write(self, record: Record) -> None:
        """Beat, and tell what is new."""
        if is_evaluation(record):
            self._alerts.beat(record["step"])
        else:
            self._alerts.beat(record["step"] + 1)
            finite = not record["not_finite"]
            if self._was_finite and not finite:
                self._alerts.tell("not_finite", f"loss {record['loss']}, gradient norm {record['grad_norm']}")
            self._was_finite = finite
        self._follow()

    def close(self) -> None:
        """Tell what the journal has got since the last record."""
        self._follow()

    def _follow(self) -> None:
        new = self._journal.events[self._seen :]
        self._seen += len(new)
        for event in new:
            told = _of_journal(event)
            if told is not None:
                self._alerts.tell(*told)


def _of_journal(event: Event) -> tuple[str, str] | None:
    data = event.data
    if event.kind == "rollback":
        passed = f"; the updates of steps {data['passed_over']} are left out" if data.get("passed_over") else ""
        return "rollback", f"anomaly in step {data['anomaly']}, back to step {data['to']}{passed}"
    if event.kind == "anomaly" and data.get("action") != "none":
        return "loss_spike", f"{data.get('why', 'anomaly')}; {data.get('action', '')}"
    return None


@contextlib.contextmanager
def alerting(config: RunConfig, hooks: Sequence[Hook], is_first_rank: bool) -> Iterator[Alerts]:
    """The alerts of a run, sent to `hooks`; an exception that passes is told, then goes on."""
    used = config.alerts.model_copy(update={"hooks": list(hooks)})
    opened = Alerts(used, Path(config.run.dir), config.run.name, is_first_rank)
    try:
        yield opened
    except BaseException as error:
        opened.failed(error)
        raise
    finally:
        opened.close()


def usable_hooks(config: RunConfig) -> list[Hook]:
    """The hooks whose environment variables are set.

    Raises ConfigError for one that is not, when the run is new. In a resumed run, where nobody may be watching, such a
    hook is left out with a warning.
    """
    kept: list[Hook] = []
    for number, hook in enumerate(config.alerts.hooks):
        names = [getattr(hook, key, None) for key in ("url_env", "token_env", "password_env")]
        missing = [name for name in names if name and not os.environ.get(name)]
        if not missing:
            kept.append(hook)
            continue
        text = f"alerts.hooks.{number}: the environment variable {missing[0]} is not set"
        if not (Path(config.run.dir) / "journal.jsonl").exists():
            raise ConfigError(f"{text}; export it where the run starts, or take the hook out")
        log.warning("%s; the hook is left out", text)
    return kept
