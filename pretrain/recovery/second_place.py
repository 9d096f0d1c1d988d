"""A second place for finished checkpoints: another folder, or an object store, through fsspec.

    place = SecondPlace("s3://bucket/cod")
    place.put(run_dir / "checkpoints" / "step-00000100", run_dir / "journal.jsonl")
    place.steps()                                                    # [100]
    place.fetch(100, "meta.json", place.sums(100)["meta.json"], to)

    s3://bucket/cod/step-00000100/…                what the checkpoint's folder has
    s3://bucket/cod/step-00000100/journal.jsonl    the run's journal of that moment: a run can be begun again from here
    s3://bucket/cod/step-00000100/manifest.json    size and SHA-256 of all these

The manifest comes last, when every other file has been read back and is what was sent; a folder without one is a copy
that was cut short. Loads neither torch nor megatron. Failures of a store are told as `data_scheduler.remote` tells
them: UnreachableError after some tries, ConfigError for what a person has to mend; those of a folder are OSErrors.
"""

import hashlib
import posixpath
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from data_scheduler.paths import is_url
from data_scheduler.remote import attempt
from headrace.errors import ConfigError
from parallel.file_sum import FileSum, file_sum
from pretrain.recovery.manifest import NAME, DamagedCheckpoint, as_text, parse, sums_of
from pretrain.recovery.retention import doomed

T = TypeVar("T")
JOURNAL = "journal.jsonl"
WITHOUT_FOLDERS = ("s3://", "s3a://", "gs://", "gcs://", "az://", "abfs://", "hf://")
"""There, making a folder would make a bucket, which is not for us to decide."""
PIECE = 16 << 20
"""Bytes read at a time."""
BEGINNING = 4096
"""Bytes of a journal that tell a run from any other: its first event has configuration and time of its start."""


class SecondPlace:
    """The copies of one run's checkpoints."""

    def __init__(self, url: str) -> None:
        """`url`: a folder, or what fsspec knows; nothing is asked of it yet. Raises ConfigError."""
        self.url = url.rstrip("/")
        self._system, self._root = self._ask(self._open)

    def steps(self) -> list[int]:
        """Steps with a whole copy, ascending."""
        return sorted(step for step, whole in self._folders().items() if whole)

    def sums(self, step: int) -> dict[str, FileSum]:
        """What the files of a copy must be like. Raises DamagedCheckpoint."""
        return parse(self._ask(lambda: self._system.cat_file(self._path(step, NAME))), f"{self._shown(step)}/{NAME}")

    def read(self, step: int, name: str) -> bytes:
        """A small file of a copy, held against its sum. Raises DamagedCheckpoint."""
        content: bytes = self._ask(lambda: self._system.cat_file(self._path(step, name)))
        wanted = self.sums(step).get(name)
        if wanted != FileSum(len(content), hashlib.sha256(content).hexdigest()):
            raise DamagedCheckpoint(f"{self._shown(step)}: {name} is not what was written")
        return content

    def fetch(self, step: int, name: str, wanted: FileSum, to: Path) -> None:
        """Copy one file from here to `to`. Raises DamagedCheckpoint when it is not what is `wanted`."""
        to.parent.mkdir(parents=True, exist_ok=True)
        path = self._path(step, name)

        def receive() -> FileSum:
            with self._system.open(path, "rb") as source, open(to, "wb") as sink:
                return _pour(source, sink.write)

        try:
            found = self._ask(receive)
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{self._shown(step)}: {name} is not there") from None
        if found != wanted:
            raise DamagedCheckpoint(f"{self._shown(step)}: {name} is not what was written")

    def is_of(self, journal: Path) -> bool:
        """Whether the copies here, if there are any, are of the run with this journal."""
        steps = self.steps()
        if not steps:
            return True
        with open(journal, "rb") as file:
            own = file.read(BEGINNING)
        try:
            theirs = self._ask(lambda: self._system.cat_file(self._path(steps[-1], JOURNAL), start=0, end=BEGINNING))
        except FileNotFoundError:
            return False
        shorter = min(len(own), len(theirs))
        return bool(shorter) and own[:shorter] == theirs[:shorter]

    def put(self, folder: Path, journal: Path) -> bool:
        """Copy a finished checkpoint; False: it was here already, whole.

        Raises DamagedCheckpoint when what is on disk is not what was written, ConfigError when this is another run's
        place.
        """
        step = int(folder.name.removeprefix("step-"))
        if not self.is_of(journal):
            raise ConfigError(f"{self.url} has the checkpoints of another run; give each run a place of its own")
        sums = sums_of(folder)
        if self._folders().get(step):
            if sums.items() <= self.sums(step).items():
                return False
            self.remove(step)  # of a run that was resumed before it
        for name, wanted in sums.items():
            if name != JOURNAL:  # which a checkpoint that came from here has
                self._send(folder / name, step, name, wanted)
        content = journal.read_bytes()
        content = content[: content.rfind(b"\n") + 1]  # without a line that is being written
        sums[JOURNAL] = FileSum(len(content), hashlib.sha256(content).hexdigest())
        self._write(step, JOURNAL, content)
        self._write(step, NAME, as_text(sums).encode())
        return True

    def retire(self, newest: int, keep_last: int, keep_every: int) -> None:
        """Remove what need not stay once `newest` is here: older copies (`retention.py`), and those cut short."""
        folders = self._folders()
        going = doomed(sorted(step for step, whole in folders.items() if whole), keep_last, keep_every)
        for step in {*going, *(step for step, whole in folders.items() if not whole)} - {newest}:
            self.remove(step)

    def remove(self, step: int) -> None:
        """Remove a copy, its manifest first: none that is half removed must look whole."""
        if self._ask(lambda: self._system.exists(self._path(step, NAME))):
            self._ask(lambda: self._system.rm_file(self._path(step, NAME)))
        self._ask(lambda: self._system.rm(self._path(step), recursive=True))

    def _folders(self) -> dict[int, bool]:
        """Whether it has its manifest, by step."""

        def look() -> dict[int, bool]:
            self._system.invalidate_cache()
            try:
                listed = self._system.ls(self._root, detail=False)
            except FileNotFoundError:
                return {}
            names = (posixpath.basename(each.rstrip("/")).removeprefix("step-") for each in listed)
            steps = [int(name) for name in names if name.isdecimal()]
            return {step: bool(self._system.exists(self._path(step, NAME))) for step in steps}

        return self._ask(look)

    def _send(self, path: Path, step: int, name: str, wanted: FileSum) -> None:
        target = self._path(step, name)

        def send() -> FileSum:
            if not self.url.startswith(WITHOUT_FOLDERS):
                self._system.makedirs(posixpath.dirname(target), exist_ok=True)
            with open(path, "rb") as source, self._system.open(target, "wb") as sink:
                return _pour(source, sink.write)

        def read_back() -> FileSum:
            with self._system.open(target, "rb") as source:
                return _pour(source)

        if self._ask(send) != wanted and file_sum(path) != wanted:
            raise DamagedCheckpoint(f"{path.parent}: {path.name} is not what was written (its SHA-256 differs)")
        if self._ask(read_back) != wanted:
            raise OSError(0, "reads back as something else than was sent", f"{self._shown(step)}/{name}")

    def _write(self, step: int, name: str, content: bytes) -> None:
        self._ask(lambda: self._system.pipe_file(self._path(step, name), content))

    def _path(self, step: int, name: str = "") -> str:
        return posixpath.join(self._root, f"step-{step:08d}", name).rstrip("/")

    def _shown(self, step: int) -> str:
        return f"{self.url}/step-{step:08d}"

    def _open(self) -> tuple[Any, str]:
        import fsspec

        system, path = fsspec.core.url_to_fs(self.url)
        return system, str(path).rstrip("/")

    def _ask(self, call: Callable[[], T]) -> T:
        return attempt(self.url, call) if is_url(self.url) else call()


def _pour(source: Any, write: Callable[[bytes], object] = len) -> FileSum:
    """Read all of `source`, and `write` it; its sum."""
    digest, size = hashlib.sha256(), 0
    while piece := source.read(PIECE):
        write(piece)
        digest.update(piece)
        size += len(piece)
    return FileSum(size, digest.hexdigest())
