"""The run's journal: every decision that shapes the data order, in the order it was taken.

One JSON object a line, `{"seq", "time", "step", "kind", "data", "by", "crc"}`; `seq` counts from 0, `step` is the step
from which the event takes effect, `crc` is the CRC-32 of the line's other fields. A line is on disk before the event
takes effect. The data order is a pure function of this file: `time` is for people and shapes nothing.

A process killed inside a write leaves a torn last line; it had not taken effect, so it is cut off when the journal is
opened again. A bad line anywhere else means the file was damaged, and is an error.
"""

import errno
import os
import threading
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

import orjson

from data_scheduler.collector import collector_waits
from headrace.errors import CheckpointError

Kind = Literal[
    "run_started",
    "resumed",
    "manifest",
    "mixture",
    "stage",
    "policy",
    "policy_input",
    "proposed",
    "frozen",
    "lr_scale",
    "eval_every",
    "stop_at",
    "paused",
    "save_asked",
    "quarantine",
    "undone",
    "source_added",
    "grown",
    "limits",
    "capped",
    "reject",
    "checkpoint",
    "anomaly",
    "rollback",
    "control_refused",
    "run_finished",
]
KINDS: Final = frozenset(get_args(Kind))


@dataclass(frozen=True)
class Event:
    """One line of the journal."""

    seq: int
    time: float
    """Seconds since the epoch, for people only."""
    step: int
    """First step the event applies to."""
    kind: Kind
    data: dict[str, Any]
    by: str
    """Who decided: `config`, `policy:<name>`, `user:<name>`, `system`."""

    def line(self) -> bytes:
        """The event as it stands in the file, newline included."""
        body = orjson.dumps(self._fields())
        return body[:-1] + b',"crc":%d}\n' % zlib.crc32(body)

    def _fields(self) -> dict[str, Any]:
        return {
            "seq": self.seq,
            "time": self.time,
            "step": self.step,
            "kind": self.kind,
            "data": self.data,
            "by": self.by,
        }

    @staticmethod
    def parse(line: bytes) -> "Event":
        """Read one line; raises ValueError when it is torn or damaged."""
        fields = orjson.loads(line)
        if not isinstance(fields, dict):
            raise ValueError("not an object")
        crc = fields.pop("crc", None)
        if set(fields) != {"seq", "time", "step", "kind", "data", "by"} or fields["kind"] not in KINDS:
            raise ValueError("not a journal event")
        event = Event(**fields)
        if zlib.crc32(orjson.dumps(event._fields())) != crc:
            raise ValueError("checksum does not match")
        return event


class Journal:
    """Append-only list of events, kept in memory and, when it has a path, in a file.

    Every rank holds the same events; only the writer (rank 0) puts them on disk.
    """

    def __init__(self, path: Path | None = None, *, writable: bool = True) -> None:
        self.path = path
        self.events: list[Event] = []
        self._file: int | None = None
        self._lock = threading.Lock()  # the loader thread journals mixtures, the training thread everything else
        if path is None:
            return
        good = self._read(path) if path.exists() else 0
        if writable:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            if os.fstat(self._file).st_size > good:
                os.ftruncate(self._file, good)
                os.fsync(self._file)

    def append(self, kind: Kind, step: int, data: dict[str, Any], by: str) -> Event:
        """Record an event; returns once it is on disk. Raises OSError when it cannot be written."""
        # orjson's own view of the data, so that the event in memory equals the one a later reader sees.
        with collector_waits():
            data = orjson.loads(orjson.dumps(data))
        with self._lock:
            event = Event(len(self.events), time.time(), step, kind, data, by)
            if self._file is not None:
                self._write(self._file, event.line())
            self.events.append(event)
        return event

    def _write(self, file: int, line: bytes) -> None:
        written = os.write(file, line)
        if written != len(line):  # a full disk can take a part of the line
            os.ftruncate(file, os.fstat(file).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        os.fsync(file)

    def of(self, kind: Kind) -> list[Event]:
        """All events of one kind, oldest first."""
        return [event for event in self.events if event.kind == kind]

    def close(self) -> None:
        """Close the file; the events stay readable."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _read(self, path: Path) -> int:
        """Load the events; returns the length in bytes of the good part of the file."""
        good = 0
        lines = path.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("torn line")
                with collector_waits():
                    event = Event.parse(line)
                if event.seq != number:
                    raise ValueError(f"event {event.seq} where {number} belongs")
            except ValueError as error:
                if number == len(lines) - 1:
                    break
                raise CheckpointError(
                    f"{path}:{number + 1}: damaged journal ({error}); restore the file from a copy: "
                    "the order of the data cannot be known without it"
                ) from None
            self.events.append(event)
            good += len(line)
        return good
