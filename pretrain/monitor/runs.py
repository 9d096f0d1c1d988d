"""The run folders below a folder, by name.

A browser names a run by the text it was given in the list. The text is looked up among the folders that were found and
never joined to a path, so `../../etc` is simply the name of no run.
"""

import os
import threading
import time
from pathlib import Path
from typing import Final

from headrace.errors import ConfigError
from pretrain.monitor.run_files import is_plain, readable
from pretrain.monitor.run_folder import RunFolder

DEPTH: Final = 4
"""Folders below the root that are looked into: `runs/sweep/lr=3/…`."""
MOST_RUNS: Final = 2000
LOOK_S: Final = 2.0
"""Between two looks for new folders."""
_MARKS: Final = ("journal.jsonl", "metrics.jsonl")


class Runs:
    """The runs of a folder, or the one run that the folder is."""

    def __init__(self, root: Path) -> None:
        """Raises ConfigError when `root` is no folder."""
        if not root.is_dir():
            raise ConfigError(f"{root}: no such folder; give the folder that your runs are in, or one run's")
        self.root = root.resolve()
        self._found: dict[str, RunFolder] = {}
        self._looked = -LOOK_S
        self._lock = threading.Lock()

    def all(self) -> dict[str, RunFolder]:
        """Every run by its name: the path below the root."""
        with self._lock:
            now = time.monotonic()
            if now - self._looked >= LOOK_S:
                self._look()
                self._looked = now
            return dict(self._found)

    def get(self, name: str) -> RunFolder | None:
        """The run of that name."""
        return self.all().get(name)

    def _look(self) -> None:
        found: dict[str, RunFolder] = {}
        waiting = [(self.root, 0)]
        while waiting and len(found) < MOST_RUNS:
            folder, depth = waiting.pop(0)
            if any(is_plain(folder / mark) for mark in _MARKS):
                name = str(folder.relative_to(self.root)) if folder != self.root else folder.name
                name = readable(name)
                while name in found:  # two folders' names can read the same
                    name += "+"
                before = self._found.get(name)
                found[name] = before if before is not None and before.path == folder else RunFolder(name, folder)
            elif depth < DEPTH:
                try:
                    # No links: what is outside the folder stays outside.
                    inner = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
                except OSError:
                    continue
                waiting += [(folder / entry, depth + 1) for entry in inner if not entry.startswith(".")]
        self._found = found
