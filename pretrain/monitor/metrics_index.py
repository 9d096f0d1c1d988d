"""`metrics.jsonl` as columns: read once, then only what is new.

A series is a name and two arrays, rows and values: `loss` has a value for every record, `query_norm/3` for one in ten.
A run of 10⁶ steps with 20 numbers a step takes 160 MB here and is parsed in some ten seconds; the columns are then kept
in the user's cache folder (`index_cache`), so that the next dashboard has them at once.
"""

import math
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson

from pretrain.monitor.run_files import mark_before, open_plain

Floats = npt.NDArray[np.float64]

MOST_SERIES: Final = 5000
"""Names beyond these are not shown: the file may be anybody's."""
LONGEST_NAME: Final = 200
BLOCK: Final = 4 << 20
"""Bytes read at once; a line that is longer is no record."""
_NOT_FINITE: Final = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
KINDS: Final = ("train", "val")


class Column:
    """Values that are only ever appended."""

    def __init__(self, dtype: type[Any], values: npt.NDArray[Any] | None = None) -> None:
        self._array: npt.NDArray[Any] = np.empty(1024, dtype) if values is None else values
        self._length = 0 if values is None else len(values)
        self._shown = self._array[: self._length]

    def extend(self, values: list[Any]) -> None:
        """Append."""
        end = self._length + len(values)
        if end > len(self._array):
            grown = np.empty(max(end, 2 * len(self._array)), self._array.dtype)
            grown[: self._length] = self._array[: self._length]
            self._array = grown
        self._array[self._length : end] = values
        self._length = end
        self._shown = self._array[:end]

    def view(self) -> npt.NDArray[Any]:
        """What there is; later appends do not change it."""
        return self._shown


class Series(NamedTuple):
    """One name's values and the records they stand in."""

    rows: npt.NDArray[np.uint32]
    values: npt.NDArray[np.float32]


class Columns(NamedTuple):
    """What a table showed at one moment: every row of a series is one of `step` and `tokens`, whatever comes later."""

    step: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    """-1 where the record has none."""
    values: dict[str, Series]

    def series(self, name: str) -> Series | None:
        """The series of that name."""
        return self.values.get(name)


class Table:
    """The records of one kind: `train` (a training step's) or `val` (an evaluation's, or scores of tasks)."""

    def __init__(self) -> None:
        self.step, self.tokens = Column(np.int64), Column(np.int64)
        self.rows: dict[str, Column] = {}
        self.values: dict[str, Column] = {}
        self.shown = Columns(self.step.view(), self.tokens.view(), {})
        """What readers see, of every thread: `flush` puts another in its place and never changes this one."""
        self._pending: dict[str, tuple[list[int], list[float]]] = {}
        self._steps: list[int] = []
        self._tokens: list[int] = []
        self._count = 0

    def add(self, step: int, tokens: int, numbers: Iterator[tuple[str, float]]) -> None:
        """Take a record; seen by readers after `flush`."""
        row, pending = self._count, self._pending
        self._count += 1
        self._steps.append(step)
        self._tokens.append(tokens)
        for name, number in numbers:
            at = pending.get(name)
            if at is None:
                if name not in self.values and len(self.values) + len(pending) >= MOST_SERIES:
                    continue
                at = pending[name] = ([], [])
            at[0].append(row)
            at[1].append(number)

    def flush(self) -> None:
        """Let readers see what was added."""
        shown = dict(self.shown.values)
        for name, (rows, values) in self._pending.items():
            if rows:
                self.rows.setdefault(name, Column(np.uint32)).extend(rows)
                with np.errstate(over="ignore"):
                    self.values.setdefault(name, Column(np.float32)).extend(values)
                shown[name] = Series(self.rows[name].view(), self.values[name].view())
                rows.clear()
                values.clear()
        self.step.extend(self._steps)
        self.tokens.extend(self._tokens)
        self._steps.clear()
        self._tokens.clear()
        self.shown = Columns(self.step.view(), self.tokens.view(), shown)

    def series(self, name: str) -> Series | None:
        """The series of that name."""
        return self.shown.series(name)

    def restore(self, step: Column, tokens: Column, series: dict[str, tuple[Column, Column]]) -> None:
        """Take over columns that were kept."""
        self.step, self.tokens, self._count = step, tokens, len(step.view())
        self.rows = {name: rows for name, (rows, _) in series.items()}
        self.values = {name: values for name, (_, values) in series.items()}
        shown = {name: Series(rows.view(), values.view()) for name, (rows, values) in series.items()}
        self.shown = Columns(step.view(), tokens.view(), shown)


class MetricsIndex:
    """The columns of one file. Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = threading.Lock()
        self.generation = 0
        """How often the file was read anew from its beginning: a resumed run has cut it."""
        self.tables: dict[str, Table] = {}
        self.offset = 0
        self.size = 0
        self.modified = 0.0
        self.problem = ""
        """Why the file cannot be read, though there is one; empty: it can."""
        self._mark = b""
        self.start_again()

    @property
    def is_complete(self) -> bool:
        """Whether all of the file, as it last was, has been read."""
        return not self._more

    @property
    def version(self) -> tuple[int, int]:
        """Changes when there is something new."""
        return self.generation, self.offset

    def start_again(self) -> None:
        """Forget everything that was read."""
        self.tables = {kind: Table() for kind in KINDS}
        self.offset, self._mark, self._more = 0, b"", False
        self.generation += 1

    def restore(self, offset: int, mark: bytes, tables: dict[str, Table]) -> None:
        """Take over what was kept of this file up to `offset`; call before the first `update`."""
        self.offset, self._mark, self.tables = offset, mark, tables

    def update(self, budget_s: float = 0.3) -> None:
        """Read what is new, for `budget_s` at most (one block at least)."""
        with self.lock:
            until = time.monotonic() + budget_s
            try:
                with open_plain(self.path) as file:
                    self._check_is_same(file)
                    while self._read_block(file) and time.monotonic() < until:
                        pass
                self.problem = ""
            except FileNotFoundError:
                if self.offset:
                    self.start_again()
                self.size, self.problem = 0, ""
            except OSError as error:  # a folder, a link, another user's
                self.problem = error.strerror or type(error).__name__

    def mark(self) -> bytes:
        """CRC-32 of the bytes before the reading place, as they were when read."""
        return self._mark

    def _check_is_same(self, file: Any) -> None:
        """Start again when the file is not the one that was read so far. Its inode does not say: one that was
        removed often leaves it to the next."""
        found = os.fstat(file.fileno())
        self.size, self.modified = found.st_size, found.st_mtime
        if self.offset and (found.st_size < self.offset or mark_before(file, self.offset) != self._mark):
            self.start_again()

    def _read_block(self, file: Any) -> bool:
        """Take the whole lines of one block; whether there is more."""
        file.seek(self.offset)
        content = file.read(BLOCK)
        end = content.rfind(b"\n") + 1
        self._more = len(content) == BLOCK
        if not end:
            if len(content) < BLOCK:
                return False
            end = len(content)  # a line longer than any record: passed over
        for line in content[:end].split(b"\n"):
            self._take(line)
        for table in self.tables.values():
            table.flush()
        self.offset += end
        self._mark = mark_before(file, self.offset)
        return self._more

    def _take(self, line: bytes) -> None:
        if not line:
            return
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError:
            return  # torn, as a killed run leaves it
        if not isinstance(record, dict) or type(record.get("step")) is not int or abs(record["step"]) >= 1 << 53:
            return
        tokens = record.get("tokens")
        tokens = tokens if type(tokens) is int and 0 <= tokens < 1 << 62 else -1
        kind = "val" if "val_loss" in record or "eval" in record else "train"
        self.tables[kind].add(record["step"], tokens, _numbers(record))


def _numbers(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The record's numbers under flat names: `loss`, `source_loss/code`."""
    for key, value in record.items():
        if value.__class__ is float or value.__class__ is int:
            yield key[:LONGEST_NAME], value
        elif value.__class__ is dict:
            for inner, number in value.items():
                if number.__class__ is float or number.__class__ is int:
                    yield f"{key}/{inner}"[:LONGEST_NAME], number
                elif number.__class__ is str and number in _NOT_FINITE:
                    yield f"{key}/{inner}"[:LONGEST_NAME], _NOT_FINITE[number]
        elif value.__class__ is str and value in _NOT_FINITE:
            yield key[:LONGEST_NAME], _NOT_FINITE[value]
