"""From the second place back into the run folder: a checkpoint, and where nothing is left the journal as well."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from headrace.errors import CheckpointError, ConfigError, HeadraceError
from parallel import exchange
from parallel.process_groups import Ranks
from pretrain.checkpoint import Checkpoints
from pretrain.checkpoint_saving import give_name
from pretrain.config import CheckpointConfig
from pretrain.recovery.manifest import DamagedCheckpoint, write_manifest
from pretrain.recovery.second_place import JOURNAL, SecondPlace


def open_second_place(config: CheckpointConfig) -> SecondPlace | None:
    """What `checkpoint.copy_to` names; nothing is asked of it yet. Raises ConfigError."""
    return SecondPlace(config.copy_to) if config.copy_to else None


def steps_there(second: SecondPlace | None, checkpoints: Checkpoints, say: Callable[[str], None]) -> list[int]:
    """Steps with a whole copy, of this run. Where it cannot be asked: none and a line, if the run has checkpoints here;
    otherwise raises what is wrong, since to begin anew instead might lose the run."""
    if second is None:
        return []
    journal = checkpoints.run_dir / JOURNAL
    try:
        if journal.exists() and not second.is_of(journal):
            raise _OtherRun(f"checkpoint.copy_to: {second.url} has the checkpoints of another run; {_EACH}")
        return second.steps()
    except (HeadraceError, OSError) as error:
        if isinstance(error, _OtherRun) or not checkpoints.steps():
            raise
        say(f"warning: checkpoint.copy_to cannot be looked into, so only what is here counts: {error}")
        return []


def restore_journal(second: SecondPlace, run_dir: Path, run: dict[str, Any], say: Callable[[str], None]) -> None:
    """Where a run folder has neither journal nor checkpoints, but the second place has copies of the run: its journal.

    `run`: the configuration's section of that name. Rank 0 calls this. Raises ConfigError when the copies are those of
    another run, UnreachableError, OSError.
    """
    path = run_dir / JOURNAL
    if path.exists() or Checkpoints(run_dir).steps():
        return
    problem: DamagedCheckpoint | None = None
    for step in reversed(second.steps()):
        try:
            theirs = json.loads(second.read(step, "meta.json"))["config"]["run"]
            content = second.read(step, JOURNAL)
        except DamagedCheckpoint as damage:
            problem = damage
            continue
        if _name(theirs) != _name(run):
            raise ConfigError(f"checkpoint.copy_to: {second.url} has the checkpoints of run {_name(theirs)!r}; {_EACH}")
        half = path.with_suffix(".partial")
        half.write_bytes(content)
        half.rename(path)
        say(f"{run_dir} is empty: the run's journal as of step {step} was fetched from {second.url}")
        return
    if problem is not None:
        raise CheckpointError(f"{problem}; set checkpoint.copy_to to another place to begin anew")


def fetch(second: SecondPlace, step: int, to: Path, ranks: Ranks, beat: Callable[[str], None]) -> None:
    """Make a copy the checkpoint `to`, each rank fetching a part of its files; every rank calls this.

    Raises DamagedCheckpoint when the copy is not what was written, UnreachableError, OSError.
    """
    sums = exchange.from_first_rank(lambda: second.sums(step), ranks.rank)
    partial = exchange.from_first_rank(lambda: _prepared(to), ranks.rank)
    names = list(sums)
    for first in range(0, len(names), ranks.world_size):  # ranks meet after every file, far within any timeout
        own = names[first + ranks.rank : first + ranks.rank + 1]

        def receive(own: list[str] = own) -> None:
            for name in own:
                beat(f"fetching {name} of step {step} from {second.url}")
                second.fetch(step, name, sums[name], partial / name)

        exchange.agree(receive)

    def finish() -> None:
        write_manifest(partial, sums)
        give_name(partial, to)

    exchange.only_first_rank(finish, ranks.rank)


def _prepared(to: Path) -> Path:
    for leftover in to.parent.glob(f"{to.name}.*.fetch.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    partial = to.with_name(f"{to.name}.{os.getpid()}-{time.time_ns():x}.fetch.partial")
    partial.mkdir(parents=True)
    return partial


def _name(run: dict[str, Any]) -> str:
    return run.get("name") or Path(run["dir"]).name


_EACH = "give each run a place of its own"


class _OtherRun(ConfigError):
    """The second place is not this run's."""
