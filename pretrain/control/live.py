"""Live control as every rank sees it: the same decisions at the same boundary between two steps."""

from pathlib import Path
from typing import Any

from data_scheduler import Scheduler
from data_scheduler.config import SourceConfig
from data_scheduler.curriculum import banded
from data_scheduler.journal import Journal
from parallel import exchange
from pretrain.config import ControlConfig, RunConfig
from pretrain.control.desk import Desk, Stand, Taken

PAUSED_S = 0.5
"""How long rank 0 waits for a command before the ranks of a paused run meet again: far below any timeout of a
collective, and often enough to notice a signal."""


class Live:
    """A rank's part in live control; rank 0 has the desk."""

    def __init__(self, config: ControlConfig, run_dir: Path, rank: int) -> None:
        """Raises ConfigError on every rank when rank 0 cannot listen."""
        self._rank = rank
        self._desk: Desk | None = None
        self.over: str | None = None
        """Why commands that still wait at the end are refused; None: they are left for the run's next start."""
        self.pausing = "the run has ended; nothing was changed"
        """What those are told then that cannot be left."""

        def open_desk() -> None:
            self._desk = Desk(config, run_dir)

        exchange.only_first_rank(open_desk, rank)

    @property
    def is_asked(self) -> bool:
        """Whether commands wait here; only ever true on rank 0."""
        return self._desk is not None and self._desk.is_asked

    def wait(self) -> None:
        """Let some time of a pause go by."""
        if self._desk is not None:
            self._desk.wait(PAUSED_S)

    def obey(self, stand: Stand) -> list[Taken]:
        """Decide what waits and let it take effect; what was decided, the same on every rank. Every rank must."""

        def decide() -> list[Taken]:
            return [] if self._desk is None else self._desk.decide(stand)

        taken = exchange.from_first_rank(decide, self._rank)
        if self._rank:
            for decision, by in taken:
                stand.scheduler.take(decision, by)
        return taken

    def __enter__(self) -> "Live":
        return self

    def __exit__(self, *_: object) -> None:
        """Take no more commands. Those that wait are refused when the run is done, else left for its next start."""
        if self._desk is not None:
            self._desk.close(self.over, self.pausing)
            self._desk = None


def setting(scheduler: Scheduler, kind: str, otherwise: Any) -> Any:
    """What people have set for the next step, or `otherwise`."""
    value = scheduler.plan.settings[kind].at(scheduler.next_step)
    return otherwise if value is None else value


def with_live_sources(config: RunConfig) -> RunConfig:
    """The configuration with the sources that people added while the run was live, where the run has them.

    A configuration that names such a source itself is left as it is. Raises CheckpointError for a damaged journal.
    """
    path = Path(config.run.dir) / "journal.jsonl"
    if not path.exists():
        return config
    journal = Journal(path, writable=False)
    if not any(event.by.startswith("user:") for event in journal.of("source_added")):
        return config
    sources = list(banded(config.data, journal, measuring=False).sources)
    known = {source.name for source in sources}
    place = len(journal.events[0].data["data"]["sources"])
    for event in journal.of("source_added"):
        source = SourceConfig.model_validate(event.data["source"])
        if event.by.startswith("user:") and source.name not in known:
            sources.insert(place, source)
        place += 1
    return config.model_copy(update={"data": config.data.model_copy(update={"sources": sources})})
