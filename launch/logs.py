"""`headrace launch logs`: what the ranks and the job script wrote, one after the other or merged by time.

On SLURM and by ssh every line of `<run>/log/rank-<N>.log` begins with its time. A line without one, as in the logs of a
local run, belongs to the line before it.
"""

import heapq
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from headrace.errors import ConfigError

TIME = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d{3})?) ")
POLL_S = 0.5


def log_files(run_dir: Path, ranks: Sequence[int] | None) -> dict[str, Path]:
    """Files by the name of who wrote them: `rank 0`, ..., `job 4242`. Raises ConfigError without any."""
    folder = run_dir / "log"
    by_rank = {int(path.stem.partition("-")[2]): path for path in folder.glob("rank-*.log")}
    found = {f"rank {rank}": by_rank[rank] for rank in sorted(by_rank) if ranks is None or rank in ranks}
    if ranks is None:
        jobs = sorted(folder.glob("slurm-*.log"), key=lambda path: path.stat().st_mtime)
        found |= {f"job {path.stem.partition('-')[2]}": path for path in jobs}
    if not found:
        raise ConfigError(f"{folder}: no log{' of these ranks' if ranks else ''} there yet")
    return found


def one_after_the_other(files: dict[str, Path], last: int) -> Iterator[str]:
    """The last lines of every file, under its name."""
    for name, path in files.items():
        yield f"--- {name}: {path}"
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        yield from lines[-last:] if last else lines


def merged(files: dict[str, Path], last: int = 0) -> Iterator[str]:
    """The lines of all files by time, each behind the name of who wrote it."""
    width = max(map(len, files))
    rows = list(heapq.merge(*(_timed(name, path) for name, path in files.items()), key=lambda row: row[:2]))
    for _, _, name, line in rows[-last:] if last else rows:
        yield f"{name:<{width}}  {line}"


def _timed(name: str, path: Path) -> Iterator[tuple[str, str, str, str]]:
    """(time, name, name, line) of every line, times never falling: a file's own order stays."""
    latest = ""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if found := TIME.match(line):
            latest = max(latest, found[1])
        yield latest, name, name, line


def follow(
    files: Callable[[], dict[str, Path]], is_over: Callable[[], bool], pause: Callable[[float], None] = time.sleep
) -> Iterator[str]:
    """New lines of all files as they come, until `is_over()`."""
    read = {path: path.stat().st_size for path in files().values()}
    while True:
        over = is_over()
        for name, path in files().items():
            with path.open("rb") as file:
                file.seek(read.get(path, 0))
                text = file.read()
            whole = text.rfind(b"\n") + 1
            read[path] = read.get(path, 0) + whole
            for line in text[:whole].decode("utf-8", "replace").splitlines():
                yield f"{name}  {line}"
        if over:
            return
        pause(POLL_S)
