"""One save of a checkpoint, from the moment its state is copied to the moment it has its name.

saving = Saving(partial, final, state, data_state, progress, behind=True)    # every rank
while saving.is_writing: ...                                                 # steps go on
saving.finish()                                                              # every rank
"""

import copy
import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

from data_scheduler.state import save_state
from headrace.errors import CheckpointError, CheckpointPostponed
from parallel import accelerator, exchange, process_groups
from parallel.background_write import BackgroundWrite
from parallel.file_sum import FileSum
from pretrain.recovery.fault_points import reach
from pretrain.recovery.manifest import names, write_manifest

FULL_BYTES = 1 << 20
"""A disk with less free space than this is called full."""
STAYS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""What does not pass by itself."""


class Saving:
    """A checkpoint that is being written."""

    def __init__(
        self,
        partial: Path,
        final: Path,
        sharded_state: Callable[[], dict[str, Any]],
        data_state: Mapping[str, Any],
        meta: Mapping[str, Any],
        rank: int,
        *,
        behind: bool,
    ) -> None:
        """Begin to write into `partial`, which is there and empty; with `behind` the files are written while the caller
        goes on. What is saved is the state of this moment. Raises CheckpointError on every rank when any cannot."""
        self.step, self.tokens, self.final = int(meta["step"]), int(meta["tokens"]), final
        self._partial, self.rank = partial, rank
        self.data_state, self._meta = copy.deepcopy(dict(data_state)), dict(meta)
        self._write: BackgroundWrite | None = None
        self._together(lambda: self._begin(sharded_state, behind))
        reach("checkpoint: state copied")

    @property
    def is_writing(self) -> bool:
        """Whether this rank's files are still being written; when none's are, `finish` does not wait."""
        return self._write is not None and self._write.is_writing

    @property
    def stall_s(self) -> float:
        """Seconds for which planning and copying held up this rank."""
        return 0.0 if self._write is None else self._write.stall_s

    def finish(self) -> Path:
        """Wait for all ranks' files and give the checkpoint its name; its path. Raises CheckpointError on every rank
        when any could not write."""
        sums = self._together(self._finish_write)
        reach("checkpoint: shards written")
        known = names(process_groups.gather_objects(sums))
        try:
            exchange.only_first_rank(lambda: self._name(known), self.rank)
        except OSError as error:
            raise self._not_written(error) from None
        reach("checkpoint: has its name")
        return self.final

    def abandon(self) -> None:
        """End the writing on this rank; the folder stays without its name, and the next save removes it."""
        if self._write is not None:
            self._write.abandon()

    def _begin(self, sharded_state: Callable[[], dict[str, Any]], behind: bool) -> None:
        reach("checkpoint: begun")
        self._write = BackgroundWrite(sharded_state(), self._partial, behind=behind)
        rng = self._partial / "rng" / f"rank-{self.rank:05d}.pt"
        rng.parent.mkdir(exist_ok=True)  # only now: megatron wants an empty folder
        torch.save(accelerator.rng_state(), rng)

    def _finish_write(self) -> dict[str, FileSum]:
        assert self._write is not None
        return self._write.finish()

    def _name(self, known: Mapping[str, FileSum]) -> None:
        save_state(self._partial / "data_state.npz", self.data_state)
        reach("checkpoint: before its name")
        publish(self._partial, self.final, self._meta, known)

    def _together(self, act: Callable[[], Any]) -> Any:
        def with_one_kind_of_error() -> Any:
            try:
                return act()
            except OSError:
                raise
            except (Exception, CheckpointException) as error:
                # A full disk reaches us from megatron's writer as the text of some other exception.
                raise OSError(errno.EIO, f"{type(error).__name__}: {first_line(error)}") from error

        try:
            return exchange.agree(with_one_kind_of_error)
        except OSError as error:
            raise self._not_written(error) from None

    def _not_written(self, error: OSError) -> CheckpointError:
        stays, reason = _reason(error, self._partial)
        kind = CheckpointError if stays else CheckpointPostponed
        return kind(f"checkpoint of step {self.step} not written: {reason}")


def publish(partial: Path, final: Path, meta: Mapping[str, Any], known: Mapping[str, FileSum] | None = None) -> None:
    """Make `partial`, which has everything else, the complete checkpoint `final`: meta.json, manifest, all on disk, the
    name. `known`: sums of files that need not be read again."""
    (partial / "meta.json").write_text(json.dumps(meta, indent=2))
    write_manifest(partial, known or {})
    give_name(partial, final)


def give_name(partial: Path, final: Path) -> None:
    """Make `partial`, in which all is, the complete checkpoint `final`: all on disk, then the name. Raises OSError."""
    for path in partial.rglob("*"):
        _sync(path)
    _sync(partial)
    if final.exists():  # saved before by a run that was resumed from an earlier checkpoint
        final.rename(final.with_name(final.name + ".old.partial"))  # the next save removes it
    partial.rename(final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _reason(error: OSError, partial: Path) -> tuple[bool, str]:
    """Whether a person has to do something about it, and what happened."""
    free = shutil.disk_usage(partial.parent if partial.parent.exists() else ".").free
    # torch's writer reports a full disk as a failed assertion about file positions.
    is_full = free < FULL_BYTES
    what = os.strerror(errno.ENOSPC) if is_full else error.strerror or error
    stays = is_full or error.errno in STAYS
    return stays, f"{what} ({error.filename or partial}; {free / 1e6:.0f} MB free there)"


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, 200 characters at most."""
    if isinstance(error, CheckpointException):  # its text is a traceback for every rank; the cause is enough
        if not error.failures:  # megatron tells the coordinator alone
            return "another rank could not write"
        error = next(iter(error.failures.values()))[0]
    return next(iter(str(error).strip().splitlines()), "")[:200]
