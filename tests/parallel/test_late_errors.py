"""An error that rank 0 alone meets in the middle of a save reaches every rank, and none waits for ever."""

from pathlib import Path

import pytest
from process_group import run_ranks
from tiny_run import tiny_config, tiny_state

from headrace.errors import CheckpointError
from parallel.layout import Layout
from pretrain import checkpoint, checkpoint_saving
from pretrain.checkpoint_saving import Saving


def told(folder: Path, behind: bool) -> str:
    """What a save into `folder` raises on this rank; afterwards another one must do."""
    state = tiny_state(tiny_config(), Layout(2))
    meta = {"step": 4, "tokens": 0}
    checkpoint_saving.save_state = lambda *_: None  # no data here, and this process is a fork of the test's

    def save(partial: Path) -> None:
        final = partial.with_name("step-00000004")
        saving = Saving(
            partial, final, lambda: checkpoint.sharded_state(state), {}, meta, state.ranks.rank, behind=behind
        )
        saving.finish()

    problem = ""
    try:
        save(folder / "first")
    except CheckpointError as error:
        problem = str(error)
    save(folder / "second")
    return problem


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ["common.pt", ".metadata", "metadata.json"])
def test_every_rank_hears_of_what_rank_0_could_not_write(tmp_path: Path, name: str) -> None:
    (tmp_path / "first" / name).mkdir(parents=True)  # where the file should be
    (tmp_path / "second").mkdir()
    problems = run_ranks(2, told, tmp_path, name == ".metadata", timeout_s=120)
    assert all("checkpoint of step 4 not written" in each for each in problems), problems
