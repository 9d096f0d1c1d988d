"""Which checkpoint a run goes on from: the newest that is whole, here or in the second place."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from headrace.errors import CheckpointError, HeadraceError
from parallel import exchange
from parallel.process_groups import Ranks
from pretrain.checkpoint import Checkpoints
from pretrain.recovery.fetching import fetch, steps_there
from pretrain.recovery.manifest import DamagedCheckpoint, set_aside, verify
from pretrain.recovery.second_place import SecondPlace


def newest_whole(
    checkpoints: Checkpoints,
    ranks: Ranks,
    say: Callable[[str], None],
    second: SecondPlace | None = None,
    verifying: bool = True,
    beat: Callable[[str], None] = lambda _: None,
) -> Path | None:
    """The newest checkpoint whose files are what was written, None without any; every rank calls this.

    Damaged ones are set aside; one that is only in the `second` place is fetched. Those that are here are taken as they
    are unless `verifying`. `beat` hears of every file that is read. Raises CheckpointError when there is none but
    damaged ones: to begin anew instead would lose the run.
    """
    there = exchange.from_first_rank(lambda: steps_there(second, checkpoints, say), ranks.rank)
    here = exchange.from_first_rank(partial(_steps, checkpoints, bool(there)), ranks.rank)
    every = sorted({*here, *there})
    problem: HeadraceError | None = None
    for step in reversed(every):
        folder = checkpoints.path(step)
        if step in here:
            try:
                if verifying:
                    exchange.agree(partial(verify, folder, ranks.rank, ranks.world_size, beat))
            except DamagedCheckpoint as damage:
                problem = damage
                if step == every[0] and step not in there:
                    break
                aside = exchange.from_first_rank(partial(set_aside, folder), ranks.rank)
                onwards = "its copy" if step in there else "the checkpoint before it"
                say(f"{damage}; it was moved to {aside.name}, and the run goes on from {onwards}")
            else:
                return folder
        if second is not None and step in there:
            try:
                fetch(second, step, folder, ranks, beat)
            except (HeadraceError, OSError) as error:
                problem = error if isinstance(error, HeadraceError) else CheckpointError(str(error))
                say(f"the copy of step {step} could not be fetched: {error}")
            else:
                say(f"{folder.name} was fetched from {second.url}, as there is no whole one here")
                return folder
    if problem is None:
        return None
    if not isinstance(problem, CheckpointError):
        raise problem
    raise CheckpointError(
        f"{problem}; there is no older one: restore it from a copy, or move its folder away to begin anew"
    )


def _steps(checkpoints: Checkpoints, has_copies: bool) -> list[int]:
    steps = checkpoints.steps()
    named = (each.name.removeprefix("step-").isdecimal() for each in checkpoints.folder.glob("step-*"))
    if not steps and not has_copies and any(named):
        raise CheckpointError(
            f"{checkpoints.folder}: has checkpoints, but none with its meta.json; restore one from a copy, or move "
            "them away to begin anew"
        )
    return steps
