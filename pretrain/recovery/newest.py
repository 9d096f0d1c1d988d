"""Which checkpoint a run goes on from."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from headrace.errors import CheckpointError
from parallel import exchange
from parallel.process_groups import Ranks
from pretrain.checkpoint import Checkpoints
from pretrain.recovery.manifest import DamagedCheckpoint, set_aside, verify


def newest_whole(checkpoints: Checkpoints, ranks: Ranks, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files are what was written, None without any; every rank calls this.

    Damaged ones are set aside. Raises CheckpointError when there is none but damaged ones: to begin anew instead would
    lose the run.
    """
    steps = exchange.from_first_rank(partial(_steps, checkpoints), ranks.rank)
    for step in reversed(steps):
        folder = checkpoints.path(step)
        try:
            exchange.agree(partial(verify, folder, ranks.rank, ranks.world_size))
        except DamagedCheckpoint as damage:
            if step == steps[0]:
                raise CheckpointError(
                    f"{damage}; there is no older one: restore it from a copy, or move its folder away to begin anew"
                ) from None
            aside = exchange.from_first_rank(partial(set_aside, folder), ranks.rank)
            say(f"{damage}; it was moved to {aside.name}, and the run goes on from the checkpoint before it")
        else:
            return folder
    return None


def _steps(checkpoints: Checkpoints) -> list[int]:
    steps = checkpoints.steps()
    if not steps and any(each.name.removeprefix("step-").isdecimal() for each in checkpoints.folder.glob("step-*")):
        raise CheckpointError(
            f"{checkpoints.folder}: has checkpoints, but none with its meta.json; restore one from a copy, or move "
            "them away to begin anew"
        )
    return steps
