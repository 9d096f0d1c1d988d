"""Files that tests compile: made once for each content of their sources, shared by all processes, kept between runs."""

import contextlib
import fcntl
import hashlib
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

CACHE = Path(__file__).parents[2] / "build" / "tests"


def digest(*content: object) -> str:
    """A name for what is made of `content`, which has a `repr` that says all."""
    return hashlib.sha256(repr(content).encode()).hexdigest()[:12]


@contextlib.contextmanager
def built_once(path: Path) -> Iterator[Path | None]:
    """Gives a place to write a file or folder, which becomes `path`; None if `path` is there.

    Other processes wait, and find it there. What fails leaves nothing behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f"{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            yield None
            return
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            target = Path(folder, path.name)
            yield target
            target.replace(path)


def run(command: list[str]) -> str:
    """What the command says; RuntimeError with it if the command fails."""
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise RuntimeError(f"{' '.join(command)}: {answer.stdout}{answer.stderr}")
    return answer.stdout + answer.stderr
