"""The run folder when a run begins: is it sound, the scheduler on its journal, the configuration as the run has it."""

from collections.abc import Callable
from pathlib import Path

from data_scheduler import Journal, Scheduler
from headrace.errors import CheckpointError
from parallel.process_groups import Ranks
from pretrain.checkpoint import Checkpoints, read_meta
from pretrain.config import RunConfig, dump_config
from pretrain.recovery.fetching import restore_journal
from pretrain.recovery.second_place import SecondPlace


def open_folder(config: RunConfig, second: SecondPlace | None, say: Callable[[str], None]) -> None:
    """Make the folder, and fetch a lost journal from the `second` place; the first rank calls this. Raises
    CheckpointError when there are checkpoints and no journal."""
    run_dir = Path(config.run.dir)
    (run_dir / "log").mkdir(parents=True, exist_ok=True)
    if second is not None:
        restore_journal(second, run_dir, config.run.model_dump(), say)
    latest = Checkpoints(run_dir).latest()
    if latest is None or (run_dir / "journal.jsonl").exists():
        return
    if not read_meta(latest).get("weights_only", False):
        raise CheckpointError(
            f"{run_dir}: has checkpoints but no journal.jsonl; restore the file from a copy, or start a new "
            "run folder: the order of the data cannot be known without it"
        )


def write_config(config: RunConfig) -> None:
    """Only once the configuration has been accepted: a refused one must not replace that of the run."""
    (Path(config.run.dir) / "config.yaml").write_text(dump_config(config), encoding="utf-8")


def open_scheduler(config: RunConfig, ranks: Ranks) -> Scheduler:
    """This rank's, with the run's journal, which the first rank writes."""
    return Scheduler(
        config.data,
        dp_rank=ranks.dp_rank,
        dp_size=ranks.dp_size,
        journal=Journal(Path(config.run.dir) / "journal.jsonl", writable=ranks.rank == 0),
        watch=False,
        hashing=True,
        run_steps=config.train.steps,
    )
