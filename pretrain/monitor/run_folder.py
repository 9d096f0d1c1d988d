"""One run as the dashboard sees it: its metrics, its journal, its configuration, and what they say about how it is."""

import threading
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import yaml

from headrace.errors import HeadraceError
from headrace.yaml_file import parse_yaml
from pretrain.monitor.index_cache import keep, restore
from pretrain.monitor.journal_tail import JournalTail
from pretrain.monitor.metrics_index import MetricsIndex

LARGEST_CONFIG: Final = 4 << 20
"""Bytes of a `config.yaml` that are read."""
SPEED_OVER: Final = 20
"""Records whose median is the speed."""
SILENT_S: Final = 60.0
"""A run whose last record is older, and older than ten of its steps, is not training."""


class RunFolder:
    """A run folder, read only."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        self.metrics = MetricsIndex(path / "metrics.jsonl")
        self.journal = JournalTail(path / "journal.jsonl")
        self.spark: tuple[str, list[float]] = ("", [])
        """The small curve in the list of runs, and the version it was drawn for."""
        self._config: dict[str, Any] = {}
        self._config_at = -1.0
        self._lock = threading.Lock()
        self._restored = False
        self._kept = 0

    def update(self, budget_s: float = 0.3) -> None:
        """Read what is new; a long file in several calls."""
        with self._lock:
            if not self._restored:
                self._restored = True
                if restore(self.metrics):
                    self._kept = self.metrics.offset
            self.metrics.update(budget_s)
            self.journal.update()
            if self.metrics.is_complete and self.metrics.offset > 1.2 * self._kept:
                self._kept = self.metrics.offset
                keep(self.metrics)

    @property
    def version(self) -> str:
        """Changes when there is something new to see."""
        generation, offset = self.metrics.version
        return f"{generation}.{offset}.{len(self.journal.events)}"

    @property
    def indexed(self) -> float:
        """Share of `metrics.jsonl` that has been read."""
        return min(1.0, self.metrics.offset / self.metrics.size) if not self.metrics.is_complete else 1.0

    def config(self) -> dict[str, Any]:
        """`config.yaml` as plain data; empty when there is none that can be read."""
        path = self.path / "config.yaml"
        try:
            found = path.stat()
            if found.st_mtime != self._config_at and found.st_size <= LARGEST_CONFIG:
                read = parse_yaml(path.read_text(encoding="utf-8"))
                self._config = read if isinstance(read, dict) else {}
                self._config_at = found.st_mtime
        except (OSError, ValueError, yaml.YAMLError, HeadraceError, RecursionError):
            self._config = {}
        return self._config

    def setting(self, section: str, key: str) -> Any:
        """A value of the configuration, or None."""
        found = self.config().get(section)
        return found.get(key) if isinstance(found, dict) else None

    def summary(self) -> dict[str, Any]:
        """What the list of runs shows."""
        train = self.metrics.tables["train"]
        steps = train.step.view()
        done = int(steps[-1]) + 1 if len(steps) else 0
        total = self.setting("train", "steps")
        total = total if isinstance(total, int) and not isinstance(total, bool) else None
        speed, step_s = self._recent("tokens_per_s"), self._recent("step_s")
        status = self._status(done, total, step_s)
        left = (total - done) * step_s if total and step_s and status == "training" else None
        tokens = train.tokens.view()
        return {
            "run": self.name,
            "title": str(self.setting("run", "name") or "") or self.path.name,
            "status": status,
            "step": done,
            "steps": total,
            "tokens": int(tokens[-1]) if len(tokens) and tokens[-1] >= 0 else None,
            "loss": self._recent("loss"),
            "tokens_per_s": speed,
            "left_s": left,
            "modified": self.metrics.modified or None,
            "indexed": self.indexed,
            "damage": self.journal.damage,
            "version": self.version,
        }

    def _status(self, done: int, total: int | None, step_s: float | None) -> str:
        events = self.journal.events
        last = events[-1].kind if events else ""
        if last == "run_finished" or (total is not None and 0 < total <= done):
            return "finished"
        # A first step can take minutes; the journal is the younger file then.
        newest = max(self.metrics.modified, events[-1].time if events else 0.0)
        silent = time.time() - newest
        paused = next((event.data.get("value") for event in reversed(events) if event.kind == "paused"), False)
        if paused:
            return "paused"
        if silent < max(SILENT_S, 10 * (step_s or 0.0)):
            return "training" if done else "starting"
        return "silent"

    def _recent(self, name: str) -> float | None:
        """Median of the last records; None when there is none, or none of them is finite."""
        series = self.metrics.tables["train"].series(name)
        if series is None:
            return None
        last = series.values[-SPEED_OVER:]
        last = last[np.isfinite(last)]
        return float(np.median(last)) if len(last) else None
