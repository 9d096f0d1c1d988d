"""Checksums of a checkpoint's files, so that a torn or changed one is never trained from.

`manifest.json` in the checkpoint's folder:

    {"files": {"__0_0.distcp": {"size": 1234, "sha256": "…"}, "meta.json": {…}, …}}

Shards are summed up by the processes that wrote them; the few small files by rank 0. Loading reads every file once
before it is used: each rank a part of them. `checkpoint.verify: false` spares it.
"""

import errno
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from headrace.errors import CheckpointError, CheckpointPostponed
from parallel.file_sum import FileSum, file_sum

NAME = "manifest.json"
GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO})
"""Errors that mean that a file is not there any more, and not that it cannot be reached."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint whose files are not what was written; an older one may do."""


def write_manifest(folder: Path, known: Mapping[str, FileSum]) -> None:
    """Sum up what is in `folder` besides what is `known`, and write it all down. Raises OSError."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    sums = {name: known.get(name) or file_sum(folder / name) for name in names if name != NAME}
    (folder / NAME).write_text(as_text(sums), encoding="utf-8")


def verify(folder: Path, part: int = 0, parts: int = 1, beat: Callable[[str], None] = lambda _: None) -> None:
    """Hold every `parts`-th file of a checkpoint against its sum; `beat` hears of each.

    Raises DamagedCheckpoint naming the first that differs. A checkpoint without a manifest, of a version before there
    were any, passes.
    """
    manifest = folder / NAME
    if not manifest.exists():
        return
    for name, wanted in list(sums_of(folder).items())[part::parts]:
        beat(f"comparing {folder / name} with its checksum")
        try:
            found = file_sum(folder / name)
        except OSError as error:
            if error.errno not in GONE:
                raise CheckpointPostponed(
                    f"{folder}: {name} cannot be read now: {error.strerror}; nothing was changed"
                ) from None
            raise DamagedCheckpoint(f"{folder}: {name}: {error.strerror}") from None
        if found.size != wanted.size:
            raise DamagedCheckpoint(f"{folder}: {name} has {found.size} bytes, {wanted.size} were written")
        if found != wanted:
            raise DamagedCheckpoint(f"{folder}: {name} is not what was written (its SHA-256 differs)")


def sums_of(folder: Path) -> dict[str, FileSum]:
    """What the files of a checkpoint must be like, by their paths in `folder`. Raises DamagedCheckpoint."""
    manifest = folder / NAME
    try:
        text = manifest.read_bytes()
    except OSError:
        raise DamagedCheckpoint(f"{manifest}: cannot be read") from None
    return parse(text, str(manifest))


def parse(text: bytes, where: str) -> dict[str, FileSum]:
    """What a manifest says; `where` it was read, for the error. Raises DamagedCheckpoint."""
    try:
        entries = json.loads(text)["files"]
        sums = {str(name): FileSum(int(entry["size"]), str(entry["sha256"])) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedCheckpoint(f"{where}: cannot be read") from None
    for name in sums:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DamagedCheckpoint(f"{where}: names a file outside the checkpoint: {name}")
    return sums


def as_text(sums: Mapping[str, FileSum]) -> str:
    """A manifest that says `sums`."""
    return json.dumps({"files": {name: asdict(each) for name, each in sums.items()}}, indent=1)


def set_aside(folder: Path, why: str = "damaged") -> Path:
    """Rename a checkpoint so that no run takes it, and keep it for whoever wants to look; its new path."""
    aside = folder.with_name(f"{folder.name}.{why}")
    number = 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}.{why}-{number}")
    folder.rename(aside)
    return aside


def names(sums: Sequence[Mapping[str, FileSum]]) -> dict[str, FileSum]:
    """Every rank's sums as one."""
    return {name: each for part in sums for name, each in part.items()}
