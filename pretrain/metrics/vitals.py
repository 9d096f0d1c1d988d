"""What a record says about the run besides its training: checkpoints, disk, rejects, restarts, and every rank's part.

    vitals = Vitals(run_dir, scheduler.journal)         # rank 0
    record |= vitals.read(scheduler.names)              # after each step
    record |= of_ranks(wait_s=0.02)                     # every rank, at the steps of metrics.ranks_every

Counts are those of the journal, so they go on where the run before a restart stopped.
"""

import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from data_scheduler.journal import Journal
from parallel import accelerator, exchange
from pretrain.metrics.registry import Record

DISK_EVERY_S = 15.0
"""The file system is asked for its free space this often; on a parallel one the question goes to every server."""


class Vitals:
    """The run's state as its journal, the clock and the disk tell it. Use on rank 0 only."""

    def __init__(self, run_dir: Path, journal: Journal, clock: Callable[[], float] = time.time) -> None:
        self._run_dir, self._journal, self._clock = run_dir, journal, clock
        self._read = 0
        """Events of the journal that have been counted."""
        self._counts: Counter[str] = Counter()
        self._rejects: Counter[str] = Counter()
        self._saved = clock()
        self._disk_free, self._disk_asked = 0, float("-inf")

    def read(self, sources: Sequence[str]) -> Record:
        """The values of this moment; a source without rejects has 0, from which on a first one can be seen to rise."""
        self._follow()
        now = self._clock()
        if abs(now - self._disk_asked) >= DISK_EVERY_S:
            self._disk_free, self._disk_asked = shutil.disk_usage(self._run_dir).free, now
        return {
            "time": now,
            "checkpoint_age_s": max(0.0, now - self._saved),  # a clock may have been set back
            "disk_free_bytes": self._disk_free,
            "rejects": dict.fromkeys(sources, 0) | dict(self._rejects),
            "restarts": self._counts["resumed"],
            "anomalies": self._counts["anomaly"] + self._counts["rollback"],  # each was journaled as one of them
            "rollbacks": self._counts["rollback"],
        }

    def _follow(self) -> None:
        """Count the journal's new events."""
        events = self._journal.events[self._read :]
        if self._read == 0 and events:
            self._saved = events[0].time
        self._read += len(events)
        for event in events:
            self._counts[event.kind] += event.data.get("action") != "none"  # that was the finding of an earlier anomaly
            if event.kind == "checkpoint":
                self._saved = event.time
            elif event.kind == "reject":
                self._rejects.update(event.data["records"])


def of_ranks(wait_s: float) -> Record:
    """Values by rank, on every rank; each calls this at the same time."""
    names = ("rank_data_wait_s", "rank_peak_memory_bytes", "rank_host_memory_bytes")
    own = [wait_s, float(accelerator.max_memory_allocated()), float(psutil.Process().memory_info().rss)]
    columns = zip(*exchange.gather_floats(own), strict=True)
    return {name: {str(rank): v for rank, v in enumerate(column)} for name, column in zip(names, columns, strict=True)}
