"""Rank 0's side of live control: requests come in at any time, between two steps they are decided and answered.

What was decided is in the journal, with the request's id, before anyone is told; a request that comes again under an id
that the journal knows is answered with what was decided then.
"""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_scheduler import Scheduler
from data_scheduler.control import (
    UNDOABLE,
    Decision,
    RefusedError,
    check_something_left,
    decide_mixture,
    decide_quarantine,
    decide_undo,
    first_step,
)
from data_scheduler.journal import Event
from data_scheduler.layout_index import LayoutIndex
from data_scheduler.left_out import Part, check_part
from data_scheduler.manifest import Manifest
from data_scheduler.source import SourceReader
from data_scheduler.transforms.source_transforms import open_transforms
from data_scheduler.unit_cache import UnitCache
from headrace.errors import ConfigError, HeadraceError
from pretrain.config import ControlConfig
from pretrain.control import request as ask
from pretrain.control.inbox import Folder, Inbox
from pretrain.control.request import Request
from pretrain.control.server import Server

MOST_WAITING = 1000
"""Requests; more are refused."""
AT_ONCE = 64
"""Requests decided between two steps: a flood of them slows training, it does not stop it."""
Answer = dict[str, Any]


class Taken(NamedTuple):
    """A decision and who took it, as every rank journals it."""

    decision: Decision
    by: str


@dataclass(frozen=True)
class Stand:
    """Where the run stands, for deciding."""

    scheduler: Scheduler
    steps: int
    """Steps of the run."""
    tokens: int


class Desk:
    """Where requests wait for the next boundary between steps."""

    def __init__(self, config: ControlConfig, run_dir: Path) -> None:
        """Begin to take requests. Raises ConfigError when an address cannot be listened on, OSError."""
        self._waiting: queue.Queue[tuple[Request, str, str, Callable[[Answer], None]]] = queue.Queue(MOST_WAITING)
        self._arrived = threading.Event()
        folder = Folder(run_dir)
        self._inbox = Inbox(folder, lambda request, who, answer: self.hand(request, who, "file", answer))
        self._server = Server(config, folder.path, self.hand) if config.http else None
        self._inbox.start()

    @property
    def is_asked(self) -> bool:
        """Whether a request waits."""
        return not self._waiting.empty()

    def hand(self, request: Request, who: str, via: str, answer: Callable[[Answer], None]) -> None:
        """Let a request wait; `answer` is called once, from another thread."""
        try:
            self._waiting.put_nowait((request, who, via, answer))
        except queue.Full:
            answer(_refused(request, f"{MOST_WAITING} commands wait already"))
        self._arrived.set()

    def wait(self, timeout_s: float) -> None:
        """Return once a request waits, or after `timeout_s`."""
        self._arrived.wait(timeout_s)

    def decide(self, stand: Stand) -> list[Taken]:
        """Decide what waits, journal it, answer; what was decided, for the other ranks.

        Raises OSError when the journal cannot be written; what was not journaled is then not answered either.
        """
        taken: list[Taken] = []
        self._arrived.clear()
        for _ in range(AT_ONCE):
            try:
                request, who, via, answer = self._waiting.get_nowait()
            except queue.Empty:
                break
            try:
                decided = self._decide(request, who, via, stand)
            except HeadraceError as error:
                answer(_refused(request, str(error)))
                continue
            except Exception as error:  # a policy from elsewhere, a file system: the run must outlive any request
                answer(_refused(request, f"it failed: {type(error).__name__}: {error}"))
                continue
            if isinstance(decided, dict):
                answer(decided)
                continue
            for decision, by in decided:
                event = stand.scheduler.take(decision, by)
            taken += decided
            answer(_accepted(request, event))
            if event.kind == "source_added":
                break  # those that follow may name it, once it is there
        return taken

    def close(self, reason: str | None, otherwise: str) -> None:
        """Take no more requests; with a `reason`, refuse those that wait, otherwise leave them for the next start, but
        for those that came by HTTP, which are refused with `otherwise`."""
        self._inbox.stop()
        if self._server is not None:
            self._server.stop()
        for request, _, via, answer in self._drained():
            if reason or via != "file":
                answer(_refused(request, reason or otherwise))

    def _drained(self) -> list[tuple[Request, str, str, Callable[[Answer], None]]]:
        drained = []
        while True:
            try:
                drained.append(self._waiting.get_nowait())
            except queue.Empty:
                return drained

    def _decide(self, request: Request, who: str, via: str, stand: Stand) -> list[Taken] | Answer:
        """Events for the journal, the last of them the answer; or an answer. Changes nothing. Raises RefusedError."""
        journal = stand.scheduler.journal
        for event in reversed(journal.events):
            if event.data.get("command") == request.id:
                return _accepted(request, event)
        if isinstance(request.ask, ask.Status):
            return {"id": request.id, "status": "ok", **status(stand)}
        by = f"user:{who}"
        before, decision = _decision(request.ask, stand)
        decision.data.update(command=request.id, why=request.why, via=via)
        check_something_left(journal, decision, by)
        return [*(Taken(fact, "system") for fact in before), Taken(decision, by)]


def _decision(command: ask.Command, stand: Stand) -> tuple[list[Decision], Decision]:
    """(facts that are journaled before it, the decision). Raises RefusedError, ConfigError or DataError."""
    scheduler, plan = stand.scheduler, stand.scheduler.plan
    step, earliest = scheduler.next_step, scheduler.earliest_change
    match command:
        case ask.SetMix():
            first = first_step(command.at, step, earliest)
            return [], decide_mixture(scheduler.names, command.weights, first, command.over or 0)
        case ask.SetPolicy():
            first = first_step(command.at, step, earliest)
            scheduler.try_policy(command.kind, command.options)
            return [], Decision("policy", first, {"kind": command.kind, "options": command.options})
        case ask.SetLrScale():
            return [], Decision("lr_scale", first_step(command.at, step, step), {"value": command.scale})
        case ask.SetEvalEvery():
            return [], Decision("eval_every", step, {"value": command.every})
        case ask.SaveNow():
            if step == 0:
                raise RefusedError("there is nothing to save before the first step")
            return [], Decision("save_asked", step, {})
        case ask.StopAt():
            last = first_step(command.at, step, step)
            if last >= stand.steps:
                raise RefusedError(f"the run ends after {stand.steps} steps anyway")
            return [], Decision("stop_at", step, {"value": last})
        case ask.Quarantine():
            return [], decide_quarantine(scheduler.names, command.source, plan, earliest, _part(command, scheduler))
        case ask.AddSource():
            return _added_source(command, stand)
        case ask.Pause() | ask.Resume():
            pause = isinstance(command, ask.Pause)
            if bool(plan.settings["paused"].at(step)) == pause:
                raise RefusedError("the run is paused already" if pause else "the run is not paused")
            return [], Decision("paused", step, {"value": pause})
        case ask.Undo():
            return [], decide_undo(scheduler.journal, command.event, step, earliest)
    raise RefusedError("not a command")


def _part(command: ask.Quarantine, scheduler: Scheduler) -> Part | None:
    """The file or record that is meant; None: the whole source. Raises RefusedError when the source has no such one."""
    if command.file is None:
        if command.record is not None or command.within is not None:
            raise RefusedError("a record needs its file")
        return None
    if command.record is None and command.within is not None:
        raise RefusedError("bytes say where a record is counted; name the record")
    part = Part(command.file, command.record, command.within and (command.within[0], command.within[1]))
    if command.source in scheduler.names:
        out = scheduler.plan.parts_out(command.source, scheduler.earliest_change)
        try:
            check_part(_reader_for_looking(scheduler, command.source), part, out)
        except ConfigError as error:
            raise RefusedError(str(error)) from None
    return part


def _reader_for_looking(scheduler: Scheduler, name: str) -> SourceReader:
    """A reader of a source with all its files, so that the loader may go on with its own."""
    reader = scheduler.readers[scheduler.names.index(name)]
    own = SourceReader(reader.config, reader.original, scheduler.config, scheduler.encoder, UnitCache())
    own.grow([Manifest.from_data(growth.manifest) for growth in scheduler.plan.grown.get(name, [])])
    return own


def _added_source(command: ask.AddSource, stand: Stand) -> tuple[list[Decision], Decision]:
    scheduler, source = stand.scheduler, command.source
    if source.name in scheduler.names:
        raise RefusedError(f"the run has a source {source.name!r}")
    if source.bands or source.band:
        raise RefusedError("bands cannot enter a live run; stop it, add the source to its configuration, and resume")
    horizon, prefetch = scheduler.config.policy.horizon, scheduler.config.prefetch
    if (source.watch or source.max_epochs) and horizon <= prefetch:
        raise RefusedError(f"data.policy.horizon: {horizon} must be larger than data.prefetch ({prefetch})")
    manifest = Manifest.take(source, LayoutIndex(scheduler.config.cache_folder() / "index.sqlite"))
    paths = (path for path, _ in manifest.files)
    objectives = scheduler.config.objectives_of(source)
    open_transforms(source, paths, scheduler.encoder, scheduler.config.seed, objectives)
    chosen = scheduler.plan.chosen(scheduler.next_step)
    try:
        scheduler.try_policy(chosen.kind, chosen.options, (source, manifest))
    except ConfigError as error:
        raise RefusedError(f"the policy in force does not take a new source: {error}; use set-policy first") from None
    # In this order: a source is of the run from `source_added` on, and then needs its files.
    step = scheduler.next_step
    added = Decision("source_added", step, {"source": source.model_dump(mode="json")})
    return [Decision("manifest", step, manifest.to_data())], added


def status(stand: Stand) -> Answer:
    """Where the run stands and what people have changed."""
    scheduler, plan = stand.scheduler, stand.scheduler.plan
    step = scheduler.next_step
    settings = {kind: timeline.at(step) for kind, timeline in plan.settings.items()}
    undone = {event.data["event"] for event in scheduler.journal.of("undone")}
    asked = [event for event in scheduler.journal.events if event.by.startswith("user:")]
    return {
        "step": step,
        "steps": stand.steps,
        "tokens": stand.tokens,
        "earliest_change": scheduler.earliest_change,
        "mixture": dict(plan.asked(step) or {}),
        "decided_by": "person" if plan.person_decides(step) else f"policy:{plan.chosen(step).kind}",
        "quarantined": sorted(plan.quarantined(step))
        + [f"{name}:{part}" for name in scheduler.names for part in plan.parts_out(name, step)],
        **settings,
        "paused": bool(settings["paused"]),
        "changes": [
            {
                "event": event.seq,
                "step": event.step,
                "kind": event.kind,
                "by": event.by,
                "why": event.data.get("why", ""),
                "undone": event.seq in undone,
                "undoable": event.kind in UNDOABLE and event.seq not in undone,
            }
            for event in asked[-50:]
        ],
    }


def _accepted(request: Request, event: Event) -> Answer:
    return {"id": request.id, "status": "accepted", "event": event.seq, "step": event.step, "kind": event.kind}


def _refused(request: Request, reason: str) -> Answer:
    return {"id": request.id, "status": "refused", "reason": reason}
