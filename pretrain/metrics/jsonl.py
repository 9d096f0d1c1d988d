"""`metrics.jsonl`: the record of truth, one JSON object a line, each step once.

Floats are written with Python's shortest repr, which reads back to the same bits. JSON has no NaN or infinity, and
Python's bare `NaN` stops other readers at the one line somebody wants to see; they are written as the strings "NaN",
"Infinity" and "-Infinity" (null would lose which), and `read_records` turns them back into floats.

A killed run leaves records of steps after its last checkpoint, and maybe half a line. A run resumed at step R does
those steps again, so opening the file with `resume_step=R` moves what they superseded to `metrics.superseded.jsonl`:

    checkpoint at 4, killed at 6      train 0 1 2 3 4 5   eval 0 2 4 6
    open(path, resume_step=4)         train 0 1 2 3       eval 0 2 4      superseded: train 4 5, eval 6
"""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrain.metrics.registry import Record, has_scores, is_evaluation

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def encode(record: Record) -> bytes:
    """`record` as one line, newline included."""
    return json.dumps(plain(record), ensure_ascii=False, allow_nan=False).encode("utf-8", "replace") + b"\n"


def decode(line: bytes | str) -> Record:
    """The record of one line; raises ValueError when the line is not a whole JSON object with a step."""
    record = json.loads(line)
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        raise ValueError("not a metrics record")
    return {key: _float_back(value) for key, value in record.items()}


def read_records(path: Path) -> Iterator[Record]:
    """The whole records of a file, also of a run that is still writing; a torn line is passed over."""
    with path.open("rb") as file:
        for line in file:
            try:
                yield decode(line)
            except ValueError:
                continue


def append_record(path: Path, record: Record) -> None:
    """Add one record to a file that a run may be writing too: one write at the end, on a line of its own even where a
    killed run has left half a line. Raises OSError."""
    line = encode(record)
    with path.open("a+b", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = b"\n" + line
        file.write(line)


class JsonlSink:
    """Appends records to `metrics.jsonl`."""

    def __init__(self, path: Path, resume_step: int) -> None:
        self._evaluated_at = _supersede(path, resume_step)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    @classmethod
    def open(cls, path: Path, resume_step: int = 0) -> "JsonlSink":
        """A sink whose file holds only what came before the first step to be written, `resume_step`.

        Raises OSError (a full disk, a read-only folder).
        """
        return cls(path, resume_step)

    def write(self, record: Record) -> None:
        """Append one line; it is with the operating system on return, so a killed process loses nothing.

        Raises OSError, after taking back the part that was written.
        """
        if is_evaluation(record) and record["step"] == self._evaluated_at:
            return  # evaluated before the checkpoint was resumed from: the same weights, the same numbers
        line = encode(record)
        size = os.fstat(self._fd).st_size
        try:
            # A second round only on a disk that is filling up; it raises there.
            while line:
                line = line[os.write(self._fd, line) :]
        except OSError:
            os.ftruncate(self._fd, size)
            raise

    def close(self) -> None:
        """Flush to the disk and close; a second call does nothing."""
        if self._fd >= 0:
            os.fsync(self._fd)
            os.close(self._fd)
            self._fd = -1


def _supersede(path: Path, resume_step: int) -> int:
    """Move records that will be written again, and torn lines, out of `path`.

    Returns the step of an evaluation of the resumed checkpoint itself, which stays; -1 without one. A run that starts
    at step 0 starts with new weights, so nothing from before stays.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return -1
    kept: list[bytes] = []
    cut: list[bytes] = []
    evaluated_at = -1
    for line in content.removesuffix(b"\n").split(b"\n") if content else ():
        try:
            record = decode(line)
        except ValueError:
            cut.append(encode({"torn": line.decode("utf-8", "replace")}))
            continue
        of_checkpoint = (is_evaluation(record) or has_scores(record)) and record["step"] == resume_step > 0
        if of_checkpoint and is_evaluation(record):
            evaluated_at = resume_step
        (kept if record["step"] < resume_step or of_checkpoint else cut).append(line + b"\n")
    if b"".join(kept) != content:
        # What is cut is on disk before the file that held it is replaced: a crash in between keeps it twice, never zero
        # times.
        if cut:
            _write_through(path.with_name("metrics.superseded.jsonl"), b"".join(cut), "ab")
        new = path.with_name(path.name + ".new")
        _write_through(new, b"".join(kept), "wb")
        new.replace(path)
    return evaluated_at


def _write_through(path: Path, content: bytes, mode: str) -> None:
    with path.open(mode) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def plain(value: Any) -> Any:
    """Plain JSON types; numpy and torch scalars become Python's, non-finite floats strings."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, str | bool | int | type(None)):
        return value
    if not isinstance(value, float):
        return plain(value.item())
    if math.isfinite(value):
        return float(value)  # numpy.float64 is a float whose repr is not a number
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _float_back(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _float_back(item) for key, item in value.items()}
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value
