"""One run as the dashboard sees it: its metrics, its journal, its configuration, and what they say about how it is."""

import os
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
from pretrain.monitor.run_files import open_plain, readable

LARGEST_CONFIG: Final = 4 << 20
"""Bytes of a `config.yaml` that are read."""
LONGEST_TITLE: Final = 200
MOST_STEPS: Final = 1 << 53
"""Larger numbers are not exact in a browser."""
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
        self._config_at = (-1, -1, -1)
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
        return f"{generation}.{offset}.{self.journal.version}"

    @property
    def indexed(self) -> float:
        """Share of `metrics.jsonl` that has been read."""
        return min(1.0, self.metrics.offset / self.metrics.size) if not self.metrics.is_complete else 1.0

    def config(self) -> dict[str, Any]:
        """`config.yaml` as plain data; empty when there is none that can be read."""
        try:
            with open_plain(self.path / "config.yaml") as file:
                found = os.fstat(file.fileno())
                at = (found.st_ino, found.st_mtime_ns, found.st_size)
                if at == self._config_at:
                    return self._config
                content = file.read(LARGEST_CONFIG) if found.st_size <= LARGEST_CONFIG else b""
        except OSError:
            self._config, self._config_at = {}, (-1, -1, -1)
            return self._config
        try:
            text = content.decode("utf-8")
            read = None if _merges(text) else parse_yaml(text)
        except (ValueError, TypeError, yaml.YAMLError, HeadraceError, RecursionError):
            read = None  # and not tried again before the file changes
        self._config = read if isinstance(read, dict) else {}
        self._config_at = at
        return self._config

    def setting(self, section: str, key: str) -> Any:
        """A value of the configuration, or None."""
        found = self.config().get(section)
        return found.get(key) if isinstance(found, dict) else None

    def summary(self) -> dict[str, Any]:
        """What the list of runs shows."""
        train = self.metrics.tables["train"].shown
        steps = train.step
        done = int(steps[-1]) + 1 if len(steps) else 0
        total = self.setting("train", "steps")
        total = total if type(total) is int and 0 < total < MOST_STEPS else None
        speed, step_s = self._recent("tokens_per_s"), self._recent("step_s")
        status = self._status(done, total, step_s)
        left = (total - done) * step_s if total and step_s and status == "training" else None
        tokens = train.tokens
        title = self.setting("run", "name")
        return {
            "run": self.name,
            # Only text: what a nest of aliases in YAML would be as text has no end.
            "title": readable((title if isinstance(title, str) and title else self.path.name)[:LONGEST_TITLE]),
            "status": status,
            "step": done,
            "steps": total,
            "tokens": int(tokens[-1]) if len(tokens) and tokens[-1] >= 0 else None,
            "loss": self._recent("loss"),
            "tokens_per_s": speed,
            "left_s": left,
            "modified": self.metrics.modified or None,
            "indexed": self.indexed,
            "damage": self._damage(),
            "version": self.version,
        }

    def failed(self, error: Exception) -> dict[str, Any]:
        """What the list shows of a run that cannot be shown: nobody else's run may go with it."""
        return {
            "run": self.name,
            "title": self.name,
            "status": "damaged",
            "step": 0,
            "steps": None,
            "tokens": None,
            "loss": None,
            "tokens_per_s": None,
            "left_s": None,
            "modified": None,
            "indexed": 1.0,
            "damage": f"this run's files cannot be shown ({type(error).__name__})",
            "version": "damaged",
        }

    def _damage(self) -> str:
        """What is wrong with the run's files, in one line; empty: nothing."""
        unread = {"metrics.jsonl": self.metrics.problem, "journal.jsonl": self.journal.problem}
        lines = [f"{name} cannot be read: {why}" for name, why in unread.items() if why]
        return "; ".join([*lines, *filter(None, [self.journal.damage])])

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


def _merges(text: str) -> bool:
    """Whether a YAML text has merge keys (`<<`). Runs write none, and ten lines of them, each merging the one before
    ten times, are 10¹⁰ values when they are read. Raises yaml.YAMLError."""
    waiting, seen = [yaml.compose(text, yaml.SafeLoader)], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
                return True
            waiting += [part for pair in node.value for part in pair]
        else:
            waiting += node.value
    return False
