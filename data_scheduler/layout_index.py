"""Which row groups, record batches or documents files have: footers read with threads, and kept for the next start.

    index = LayoutIndex(Path("~/.cache/headrace/index.sqlite").expanduser())
    layouts, problems = index.layouts(list_files(["corpus/"], "source 'web'"), "auto", "source 'web'")

What is kept is looked up by path, size and modification time (a URL's tag), so a file that changed is opened again. The
answer is the same with and without what is kept, which may be deleted at any time.
"""

import contextlib
import logging
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import orjson

from data_scheduler.listing import THREADS, File
from data_scheduler.paths import file_kind, is_url
from data_scheduler.progress import Task
from data_scheduler.reading import LAYOUT_KINDS, column_layout
from data_scheduler.remote import url_stamp

log = logging.getLogger("headrace.data")

Layouts = dict[str, list[tuple[int, int]]]
"""(records, bytes) of each row group, record batch or stretch of documents, by path."""

KEPT_FROM = 64
"""Files from which it pays to keep what was found; fewer open in 50 ms."""
SETTLED_NS = 2_000_000_000
"""A file younger than this may change again within the tick of its file system's clock; it is not kept."""
TABLE = """CREATE TABLE IF NOT EXISTS layouts
    (path TEXT NOT NULL, format TEXT NOT NULL, size INTEGER NOT NULL, stamp TEXT NOT NULL, layout BLOB NOT NULL,
     PRIMARY KEY (path, format)) WITHOUT ROWID"""
STORED_TOGETHER = 2000
"""Files written in one transaction: an index that is interrupted goes on from there."""


class LayoutIndex:
    """Layouts of files, kept in an SQLite file; None: kept nowhere."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def layouts(self, files: Sequence[File], format: str, owner: str) -> tuple[Layouts, dict[str, str]]:
        """(layout of every file that has one, why others cannot be read), both in the files' order.

        Raises ConfigError for a file whose format is not known.
        """
        columns = [file for file in files if file_kind(file.path, format)[0] in LAYOUT_KINDS]
        if len(columns) < KEPT_FROM or self._path is None:
            with Task(f"{owner}: opening files", len(columns)) as task:
                return _open_all(columns, format, task)
        columns = _stamped(columns)
        kept = self._kept(columns, format)
        missing = [file for file in columns if file.path not in kept]
        layouts: Layouts = dict(kept)
        problems: dict[str, str] = {}
        with Task(f"{owner}: opening files", len(missing)) as task:
            for at in range(0, len(missing), STORED_TOGETHER):
                some = missing[at : at + STORED_TOGETHER]
                found, failed = _open_all(some, format, task)
                self._keep([file for file in some if file.path in found], format, found)
                layouts |= found
                problems |= failed
        return {file.path: layouts[file.path] for file in columns if file.path in layouts}, problems

    def _kept(self, files: Sequence[File], format: str) -> Layouts:
        """What was found before in files that have not changed since."""
        wanted = {_absolute(file.path): file for file in files if file.stamp}
        names = list(wanted)
        kept: Layouts = {}
        try:
            with self._database() as database:
                for at in range(0, len(names), 500):
                    some = names[at : at + 500]
                    query = f"SELECT * FROM layouts WHERE format = ? AND path IN ({','.join('?' * len(some))})"
                    for name, _, size, stamp, layout in database.execute(query, [format, *some]):
                        file = wanted[name]
                        if (size, stamp) == (file.size, file.stamp):
                            kept[file.path] = list(map(tuple, orjson.loads(layout)))
        except (OSError, sqlite3.Error) as error:
            self._give_up(error)
        return kept

    def _keep(self, files: Sequence[File], format: str, layouts: Layouts) -> None:
        now = time.time_ns()
        rows = [
            (_absolute(file.path), format, file.size, file.stamp, orjson.dumps(layouts[file.path]))
            for file in files
            if file.stamp and (is_url(file.path) or now - int(file.stamp) > SETTLED_NS)
        ]
        try:
            with self._database() as database, database:
                database.executemany("INSERT OR REPLACE INTO layouts VALUES (?, ?, ?, ?, ?)", rows)
        except (OSError, sqlite3.Error) as error:
            self._give_up(error)

    @contextlib.contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """Raises OSError or sqlite3.Error, also from what is done with it."""
        if self._path is None:
            raise OSError("not usable")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(self._path, timeout=30)) as database:
            database.execute(TABLE)
            yield database

    def _give_up(self, error: Exception) -> None:
        if self._path is not None:
            log.warning("data.cache_dir: %s: %s; files are opened again at every start", self._path, error)
        self._path = None


def _open_all(files: Sequence[File], format: str, task: Task) -> tuple[Layouts, dict[str, str]]:
    """(layouts, problems) of files, in their order."""

    def look(file: File) -> list[tuple[int, int]] | str:
        try:
            return column_layout(file.path, format) or []
        except (OSError, ValueError) as error:
            return str(error)

    layouts: Layouts = {}
    problems: dict[str, str] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for file, found in zip(files, pool.map(look, files), strict=True):
            task.advance()
            if isinstance(found, str):
                problems[file.path] = found
            else:
                layouts[file.path] = found
    return layouts, problems


def _stamped(files: Sequence[File]) -> list[File]:
    """The files with the stamps of URLs, which need a question each."""
    urls = [file.path for file in files if not file.stamp]
    with ThreadPoolExecutor(THREADS) as pool:
        stamps = dict(zip(urls, pool.map(url_stamp, urls), strict=True))
    return [file._replace(stamp=stamps[file.path]) if not file.stamp else file for file in files]


def _absolute(path: str) -> str:
    return path if is_url(path) else os.path.abspath(path)
