"""`metrics.jsonl`: exact floats, readable non-finite ones, and each step once after any kill and resume."""

import json
import math
import os
import resource
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.metrics.jsonl import JsonlSink, decode, encode, read_records


def train(step: int, loss: float = 1.0) -> dict:
    return {"step": step, "loss": loss, "source_loss": {"code": loss}}


def evaluation(step: int, loss: float = 2.0) -> dict:
    return {"step": step, "val_loss": {"code": loss}}


def write_all(path: Path, records: list[dict], resume_step: int = 0) -> None:
    sink = JsonlSink.open(path, resume_step)
    for record in records:
        sink.write(record)
    sink.close()


def bits(value: float) -> bytes:
    return struct.pack("<d", value)


@given(st.floats(), st.floats())
def test_floats_read_back_to_the_same_bits(loss: float, source_loss: float) -> None:
    line = encode({"step": 3, "loss": loss, "source_loss": {"a": source_loss}})
    json.loads(line, parse_constant=pytest.fail)  # strict JSON: no bare NaN
    back = decode(line)
    for written, read in ((loss, back["loss"]), (source_loss, back["source_loss"]["a"])):
        assert bits(read) == bits(written) or (math.isnan(read) and math.isnan(written))


def test_numpy_scalars_are_written_as_the_numbers_they_are() -> None:
    record = {"step": 1, "loss": np.float32(0.1), "lr": np.float64(0.1), "tokens": np.int64(7)}
    assert encode(record) == b'{"step": 1, "loss": 0.10000000149011612, "lr": 0.1, "tokens": 7}\n'


def test_names_in_any_script_stay_readable() -> None:
    record = {"step": 1, "source_loss": {"维基": 1.5, 'a"b\n': 2.0}}
    assert "维基" in encode(record).decode()
    assert encode(record).count(b"\n") == 1
    assert decode(encode(record)) == record


def run(first: int, last: int, every: int, evaluate_first: bool) -> list[dict]:
    """Records of a training loop from step `first` to `last`; `evaluate_first`: it evaluates where it starts."""
    records = [evaluation(first, first)] if evaluate_first else []
    for step in range(first, last):
        records.append(train(step, step))
        if (step + 1) % every == 0:
            records.append(evaluation(step + 1, step + 1))
    return records


@settings(deadline=None)
@given(
    kills=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 60)), max_size=3),
    every=st.integers(1, 5),
    evaluates_on_resume=st.booleans(),
)
def test_each_step_stands_once_after_any_kills(tmp_path_factory, kills, every, evaluates_on_resume) -> None:
    """Killed anywhere, bytes of the last line missing, resumed at any earlier step: the file of a run never killed."""
    total = 12
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    resume_step = 0
    for reach, torn in kills:
        reach = max(reach, resume_step)
        records = run(resume_step, reach, every, resume_step == 0 or evaluates_on_resume)
        write_all(path, records, resume_step)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) - min(torn, len(content.splitlines(True)[-1]) - 1)] if content else b"")
        # The newest checkpoint: a loop that evaluates before it saves has the evaluation in the file by then; one that
        # saves first evaluates again on resume.
        saved = [
            record["step"] + ("loss" in record)
            for record in read_records(path)
            if ("loss" in record) == evaluates_on_resume
        ]
        resume_step = max(saved, default=0) // every * every
    write_all(path, run(resume_step, total, every, resume_step == 0 or evaluates_on_resume), resume_step)
    assert [json.loads(line) for line in path.read_text().splitlines()] == list(read_records(path))
    uninterrupted = run(0, total, every, True)
    assert sorted(map(str, read_records(path))) == sorted(map(str, uninterrupted))


def test_superseded_records_are_kept_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_all(path, run(0, 6, 2, True))
    with path.open("ab") as file:
        file.write(b'{"step": 6, "lo')
    write_all(path, [], resume_step=4)
    assert [r["step"] for r in read_records(path) if "loss" in r] == [0, 1, 2, 3]
    assert [r["step"] for r in read_records(path) if "val_loss" in r] == [0, 2, 4]
    aside = [json.loads(line) for line in (tmp_path / "metrics.superseded.jsonl").read_text().splitlines()]
    assert aside == [train(4, 4), train(5, 5), evaluation(6, 6), {"torn": '{"step": 6, "lo'}]


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes((encode(train(0)) + encode(train(1))).removesuffix(b"\n"))
    write_all(path, [train(2)], resume_step=2)
    assert [r["step"] for r in read_records(path)] == [0, 1, 2]
    assert not (tmp_path / "metrics.superseded.jsonl").exists()


def test_a_new_run_keeps_nothing_of_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_all(path, [evaluation(0, 9.0), train(0)])
    write_all(path, [evaluation(0, 8.0), train(0)])
    assert [r["val_loss"] for r in read_records(path) if "val_loss" in r] == [{"code": 8.0}]


def test_nothing_is_rewritten_when_nothing_is_superseded(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_all(path, run(0, 4, 2, True))
    before = path.stat()
    write_all(path, [], resume_step=4)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_every_record_survives_kill_minus_nine(tmp_path: Path) -> None:
    """What write() returned from is in the file, without close() and without Python's buffers."""
    path = tmp_path / "metrics.jsonl"
    code = f"""
        import os, signal
        from pathlib import Path
        from pretrain.metrics.jsonl import JsonlSink
        sink = JsonlSink.open(Path({str(path)!r}))
        for step in range(100):
            sink.write({{"step": step, "loss": step / 3}})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)]).returncode == -9
    assert [(r["step"], r["loss"]) for r in read_records(path)] == [(step, step / 3) for step in range(100)]


def test_a_full_disk_raises_and_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    pid = os.fork()
    if (
        pid == 0
    ):  # a child, for the limit cannot be raised again; RLIMIT_FSIZE gives the same partial write a full disk gives
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        sink = JsonlSink.open(path)
        try:
            for step in range(10):
                sink.write(train(step))
        except OSError:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    content = path.read_bytes()
    assert content.endswith(b"\n")
    assert len(list(read_records(path))) == len(content.splitlines()) == 1
