"""A run whose checkpoints are copied elsewhere survives the loss of its own; copying never stops it."""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import child_process
import pytest
from process_group import run_ranks
from s3_server import s3_server
from small_run import Make, curve, maker, run_to_end
from test_second_place import folder_of, run_folder
from tiny_run import tiny_config

from data_scheduler import DataConfig
from headrace.errors import ConfigError, ExitCode
from parallel import process_groups
from parallel.layout import Layout
from pretrain.checkpoint import Checkpoints
from pretrain.config import CheckpointConfig, validate_config
from pretrain.recovery import fault_points
from pretrain.recovery.copies import Copies
from pretrain.recovery.manifest import verify
from pretrain.recovery.newest import newest_whole
from pretrain.recovery.second_place import JOURNAL, SecondPlace
from pretrain.train import train

pytest.importorskip("moto")


@pytest.fixture
def run_config(data_config: Callable[..., DataConfig], tmp_path: Path) -> Make:
    return maker(data_config, tmp_path)


@pytest.fixture(scope="module")
def whole(data_config: Callable[..., DataConfig], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    config = maker(data_config, tmp_path_factory.mktemp("whole"))("whole")
    run_to_end(config)
    return curve(config)


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    with s3_server("copies") as system:
        yield system


@pytest.mark.slow
def test_a_run_that_lost_its_folder_goes_on_from_s3(
    run_config: Make, whole: list[dict[str, Any]], s3: Any, tmp_path: Path
) -> None:
    config = run_config("run", checkpoint__copy_to="s3://copies/cod", checkpoint__copy_keep_last=1)

    def stopped() -> int:
        fault_points.ask("step: recorded=term,hit10")
        return train(config)

    log, place = tmp_path / "run.log", SecondPlace("s3://copies/cod")
    assert child_process.run(stopped, log) == ExitCode.RECOVERABLE
    assert place.steps() == [10], log.read_text()  # and no older one
    shutil.rmtree(config.run.dir)
    text = run_to_end(config)
    assert "is empty: the run's journal as of step 10 was fetched from s3://copies/cod" in text
    assert "step-00000010 was fetched from s3://copies/cod, as there is no whole one here" in text
    assert "at step 10 from" in text
    assert curve(config) == [record for record in whole if record["step"] >= 10 and record.get("val_loss") is None] + [
        whole[-1]
    ]
    assert place.steps() == [12]
    # A checkpoint that is damaged here is fetched too, rather than an older one taken.
    (Checkpoints(config.run.dir).path(12) / "meta.json").write_text("{}")
    text = run_to_end(run_config("run", checkpoint__copy_to="s3://copies/cod", train__steps=13))
    assert "it was moved to step-00000012.damaged, and the run goes on from its copy" in text
    assert "at step 12 from" in text


def test_another_run_does_not_take_over_the_place(run_config: Make, tmp_path: Path) -> None:
    place = str(tmp_path / "copies")
    first = run_config("first", train__steps=4, checkpoint__copy_to=place)
    assert "checkpoint of step 4 copied to" in run_to_end(first)
    second = run_config("second", train__steps=4, checkpoint__copy_to=place)
    log = tmp_path / "second.log"
    assert child_process.run(lambda: train(second), log) == ExitCode.USER_ERROR
    assert "has the checkpoints of run 'first'; give each run a place of its own" in log.read_text()


def test_a_place_in_the_runs_own_folder_is_refused(run_config: Make, tmp_path: Path) -> None:
    raw = run_config("run").model_dump(exclude={"data": {"stages"}})
    raw["checkpoint"]["copy_to"] = str(tmp_path / "run" / "checkpoints")
    with pytest.raises(ConfigError, match="in the run's own folder"):
        validate_config(raw, "test")


def heard(copies: Copies, told: list[str], what: str, times: int = 1) -> None:
    """Wait until `what` has been told so often."""
    for _ in range(1200):
        copies.hear()
        if sum(what in each for each in told) >= times:
            return
        time.sleep(0.05)
    raise AssertionError(f"{what!r} not told; {told}")


def test_a_copy_that_fails_is_tried_again_and_a_copier_that_dies_is_started_again(tmp_path: Path) -> None:
    run, blocked = run_folder(tmp_path / "run", 4, 8), tmp_path / "blocked"
    blocked.write_text("a file where the folder should be")
    told: list[str] = []
    config = CheckpointConfig(copy_to=str(blocked / "second"), copy_wait_s=60.0)
    copies = Copies(config, run, 0, told.append)
    copies.send(folder_of(run, 4))
    heard(copies, told, "not copied: Not a directory", 2)
    assert copies.unfinished == {4}
    assert copies._process is not None
    os.kill(copies._process.pid, signal.SIGKILL)
    heard(copies, told, "the process that copies checkpoints ended with exit code -9; started again")
    blocked.unlink()
    heard(copies, told, "checkpoint of step 4 copied to")
    copies.send(folder_of(run, 8))
    run_single(lambda: copies.finish(lambda _: None))
    assert "checkpoint of step 8 copied to" in told[-1]
    assert copies.unfinished == set()
    assert SecondPlace(str(blocked / "second")).steps() == [4, 8]


def test_the_end_waits_for_a_copy_no_longer_than_allowed(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", 4)
    (tmp_path / "blocked").write_text("")
    told: list[str] = []
    copies = Copies(CheckpointConfig(copy_to=str(tmp_path / "blocked" / "x"), copy_wait_s=0.5), run, 0, told.append)
    copies.send(folder_of(run, 4))
    run_single(lambda: copies.finish(lambda _: None))
    assert "the checkpoint of step 4 is not in" in told[-1]
    assert "the run's next start copies it" in told[-1]
    assert copies._process is None


def run_single(act: Callable[[], None]) -> None:
    """`act` in a run of one process."""
    process_groups.initialize(Layout(1), seed=1)
    try:
        act()
    finally:
        process_groups.shutdown()


def fetch_on_two(run: Path, url: str) -> tuple[str | None, list[str]]:
    ranks = process_groups.initialize(Layout(2), seed=tiny_config().train.seed, timeout_s=60)
    told: list[str] = []
    found = newest_whole(Checkpoints(run), ranks, told.append, SecondPlace(url))
    return found and found.name, told


@pytest.mark.multiprocess
def test_ranks_fetch_together_and_pass_over_a_damaged_copy(tmp_path: Path) -> None:
    run, url = run_folder(tmp_path / "run", 2, 4, 6), str(tmp_path / "second")
    for step in (4, 6):
        SecondPlace(url).put(folder_of(run, step), run / JOURNAL)
    for step in (4, 6):
        shutil.rmtree(folder_of(run, step))
    damaged = tmp_path / "second" / "step-00000006" / "__1_0.distcp"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    results = run_ranks(2, fetch_on_two, run, url, timeout_s=120)
    for name, told in results:
        assert name == "step-00000004"
        assert "the copy of step 6 could not be fetched" in told[0]
        assert "step-00000004 was fetched" in told[1]
    verify(folder_of(run, 4))
    assert Checkpoints(run).steps() == [2, 4]


def test_a_place_that_cannot_be_reached_matters_only_to_a_run_that_has_nothing(tmp_path: Path) -> None:
    run, empty, blocked = run_folder(tmp_path / "run", 2), tmp_path / "empty", tmp_path / "blocked"
    place = SecondPlace(str(blocked / "x"))

    def refuse() -> dict[int, bool]:
        raise PermissionError(13, "Permission denied", str(blocked))

    place._folders = refuse  # type: ignore[method-assign]
    told: list[str] = []

    def look() -> None:
        ranks = process_groups.initialize(Layout(1), seed=1)
        try:
            found = newest_whole(Checkpoints(run), ranks, told.append, place)
            assert found == folder_of(run, 2)
            assert "checkpoint.copy_to cannot be looked into" in told[0]
            with pytest.raises(PermissionError):
                newest_whole(Checkpoints(empty), ranks, told.append, place)
        finally:
            process_groups.shutdown()

    look()
