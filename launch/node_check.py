"""Is this node fit to train on? `python node_check.py CHECKS.json FOLDER` on every node, before any trainer starts.

Writes `FOLDER/<node>.json`: {"node", "time" (s since 1970), "problems": [one line each], "paths": [those of them that
are about files, which may be the run's own mistake]}. A node that writes nothing has hung or is gone, which the job
script takes for an answer too. What is checked is in CHECKS.json:

    {"gpus": 8, "read": ["/data/code/*"], "write": ["/runs/mill"], "min_free_gb": 10, "commands": ["test -d /scratch"]}

The standard library only: it must say what is wrong with a node on which nothing else can be imported.
"""

from __future__ import annotations

import csv
import glob
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

COMMAND_TIMEOUT_S = 60.0
FATAL_XIDS = {48, 62, 63, 64, 74, 79, 92, 94, 95, 119, 120, 140}
"""NVIDIA's XID errors that speak of the hardware: ECC, NVLink, fallen off the bus, GSP. Others (13, 31, 43, 45) are
mostly a program's own fault."""
GPU_FIELDS = (
    "index",
    "name",
    "ecc.errors.uncorrected.volatile.total",
    "remapped_rows.pending",
    "remapped_rows.failure",
    "clocks_throttle_reasons.hw_slowdown",
)

Run = Callable[[list[str]], "subprocess.CompletedProcess[str]"]


def run_command(words: list[str]) -> subprocess.CompletedProcess[str]:
    """`words`, its output as text; raises OSError, subprocess.TimeoutExpired."""
    return subprocess.run(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=COMMAND_TIMEOUT_S, check=False
    )


def path_problems(checks: Mapping[str, Any]) -> Iterator[str]:
    """Files and folders that this node cannot use."""
    yield from unreadable(checks["read"])
    for folder in checks["write"]:
        yield from full_or_closed(Path(folder), checks["min_free_gb"])


def node_problems(checks: Mapping[str, Any], run: Run = run_command) -> Iterator[str]:
    """What is wrong with the node itself."""
    if checks["gpus"]:
        yield from broken_gpus(checks["gpus"], run)
        yield from recent_xids(run)
    for command in checks["commands"]:
        yield from failing(command, run)


def unreadable(patterns: list[str]) -> Iterator[str]:
    """Data that this node does not see; one file of each pattern is opened."""
    for pattern in patterns:
        found = next(glob.iglob(pattern), None) or (pattern if os.path.exists(pattern) else None)
        if found is None:
            yield f"{pattern}: no such file here"
            continue
        try:
            if os.path.isdir(found):
                os.listdir(found)
            else:
                with open(found, "rb") as file:
                    file.read(1)
        except OSError as error:
            yield f"{found}: {error.strerror}"


def full_or_closed(folder: Path, min_free_gb: float) -> Iterator[str]:
    """A folder that cannot be written to, or has too little room."""
    probe = folder / f".headrace-check-{os.environ.get('SLURMD_NODENAME', '')}-{os.getpid()}"
    try:
        with open(probe, "wb") as file:
            file.write(b"written")
            os.fsync(file.fileno())
        probe.unlink()
        free = shutil.disk_usage(folder).free / 1e9
    except OSError as error:
        yield f"{folder}: {error.strerror}"
        return
    if free < min_free_gb:
        yield f"{folder}: {free:.1f} GB free (at least {min_free_gb:g})"


def broken_gpus(expected: int, run: Run) -> Iterator[str]:
    """GPUs that are missing, or that report uncorrected memory errors or a hardware slowdown."""
    try:
        answer = run(["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"])
    except (OSError, subprocess.TimeoutExpired) as error:
        yield f"nvidia-smi: {type(error).__name__}"
        return
    if answer.returncode:
        yield f"nvidia-smi: {' '.join(answer.stdout.split())[:200]}"
        return
    gpus = [[word.strip() for word in row] for row in csv.reader(answer.stdout.splitlines()) if row]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = len(gpus) if visible is None else min(len(gpus), len([word for word in visible.split(",") if word]))
    if seen < expected:
        yield f"{seen} GPUs visible, {expected} wanted"
    for index, name, ecc, pending, failed, slow in gpus:
        gpu = f"GPU {index} ({name})"
        if ecc.isdecimal() and int(ecc):
            yield f"{gpu}: {ecc} uncorrected ECC errors"
        if pending in ("Yes", "1") or failed in ("Yes", "1"):
            yield f"{gpu}: memory rows to be remapped; it needs a reset"
        if slow == "Active":
            yield f"{gpu}: clocks held down by the hardware (heat or power)"


def recent_xids(run: Run) -> Iterator[str]:
    """XID errors of the hardware in the kernel's log, where users may read it."""
    try:
        answer = run(["dmesg"])
    except (OSError, subprocess.TimeoutExpired):
        return
    if answer.returncode:
        return  # most sites keep the log to themselves; their own health check then has to look
    found = {int(number) for number in re.findall(r"NVRM: Xid \([^)]*\): (\d+)", answer.stdout)}
    for number in sorted(found & FATAL_XIDS):
        yield f"XID {number} in the kernel's log"


def failing(command: str, run: Run) -> Iterator[str]:
    """A site's own check that does not exit with 0; what it prints is the reason."""
    try:
        answer = run(["bash", "-c", command])
    except subprocess.TimeoutExpired:
        yield f"{command}: no end within {COMMAND_TIMEOUT_S:g} s"
        return
    if answer.returncode:
        yield f"{command}: {' '.join(answer.stdout.split())[:200] or f'exit code {answer.returncode}'}"


def main(checks_file: str, folder: str) -> None:
    """Write this node's answer, whole or not at all."""
    now = time.time()  # before anything slow: all nodes were started at the same moment
    node = os.environ["SLURMD_NODENAME"]
    checks = json.loads(Path(checks_file).read_text())
    paths = list(path_problems(checks))
    answer = {"node": node, "time": now, "problems": [*paths, *node_problems(checks)], "paths": paths}
    partial = Path(folder) / f"{node}.json.partial"
    partial.write_text(json.dumps(answer))
    partial.rename(partial.with_suffix(""))
    for problem in answer["problems"]:
        print(f"{node}: {problem}")


if __name__ == "__main__":
    main(*sys.argv[1:])
