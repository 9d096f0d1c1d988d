"""Every failure that has a name: the run goes on as if nothing had been, or ends with one line and loses nothing.

What each case shows is recorded as a property of its test, and `benchmarks/crash_matrix.py` makes the table of
docs/operations.md of it.
"""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import child_process
import pytest
from small_run import Make, curve, maker

from data_scheduler import DataConfig
from headrace.errors import ExitCode
from pretrain import checkpoint
from pretrain.config import RunConfig
from pretrain.processes import free_port
from pretrain.recovery import fault_points
from pretrain.train import train

Case = Callable[[str, str], None]
STEP_POINTS = [point for point in fault_points.POINTS if not point.startswith("checkpoint")]


@pytest.fixture
def run_config(data_config: Callable[..., DataConfig], tmp_path: Path) -> Make:
    return maker(data_config, tmp_path)


@pytest.fixture
def case(record_property: Callable[[str, object], None]) -> Case:
    def record(failure: str, outcome: str) -> None:
        record_property("failure", failure)
        record_property("outcome", outcome)

    return record


@pytest.fixture(scope="module")
def whole(data_config: Callable[..., DataConfig], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    config = maker(data_config, tmp_path_factory.mktemp("whole"))("whole")
    assert child_process.run(lambda: train(config)) == 0
    return curve(config)


def log_of(config: RunConfig) -> Path:
    return Path(config.run.dir).with_suffix(".log")


def failing(config: RunConfig, fault: str) -> int:
    """Exit code of a run in which `fault` happens."""

    def run() -> int:
        fault_points.ask(fault)
        return train(config)

    return child_process.run(run, log_of(config))


def goes_on_as_if_nothing_had_been(config: RunConfig, whole: list[dict[str, Any]]) -> None:
    assert child_process.run(lambda: train(config), log_of(config)) == 0, log_of(config).read_text()
    assert curve(config) == whole
    assert not list(Path(config.run.dir).glob("checkpoints/*.partial"))


@pytest.mark.parametrize("point", STEP_POINTS)
def test_killed_in_a_step(run_config: Make, whole: list[dict[str, Any]], case: Case, point: str) -> None:
    config = run_config("run", checkpoint__behind=False)  # so that it is known which checkpoint is complete
    if point == "run: resumed":
        assert failing(config, "step: recorded=kill,hit6") == -signal.SIGKILL
    hit = 1 if point == "run: resumed" else 7
    assert failing(config, f"{point}=kill,hit{hit}") == -signal.SIGKILL
    goes_on_as_if_nothing_had_been(config, whole)
    case(f"killed (SIGKILL), {point}", "resumed from the newest checkpoint; the same curve, bit for bit")


@pytest.mark.parametrize("point", ["checkpoint: begun", "checkpoint: before its name"])
def test_a_full_disk_is_one_line_and_what_was_saved_stays(
    run_config: Make, whole: list[dict[str, Any]], case: Case, point: str
) -> None:
    config = run_config("run", checkpoint__behind=False)
    code, text = failing(config, f"{point}=full,hit2"), log_of(config).read_text()
    assert code == ExitCode.USER_ERROR, text
    assert "checkpoint of step 8 not written: No space left on device" in text
    assert "Traceback" not in text
    assert checkpoint.Checkpoints(config.run.dir).steps() == [4]
    goes_on_as_if_nothing_had_been(config, whole)
    case(f"disk full, {point}", "one line, exit code 2; started again when there is room: the same curve")


def test_a_folder_that_becomes_read_only_is_one_line_and_what_was_saved_stays(
    run_config: Make, whole: list[dict[str, Any]], case: Case
) -> None:
    config = run_config("run", checkpoint__behind=False)
    code, text = failing(config, "checkpoint: begun=readonly,hit2"), log_of(config).read_text()
    assert code == ExitCode.USER_ERROR, text
    assert "checkpoint of step 8 not written: Read-only file system" in text
    assert "Traceback" not in text
    assert checkpoint.Checkpoints(config.run.dir).steps() == [4]
    goes_on_as_if_nothing_had_been(config, whole)
    case("run folder becomes read-only", "one line, exit code 2; started again when it can be written: the same curve")


def test_storage_that_fails_once_is_worth_another_attempt(
    run_config: Make, whole: list[dict[str, Any]], case: Case
) -> None:
    config = run_config("run", checkpoint__behind=False)
    code, text = failing(config, "checkpoint: begun=ioerror,hit2"), log_of(config).read_text()
    assert code == ExitCode.RECOVERABLE, text
    assert "checkpoint of step 8 not written: Input/output error" in text
    assert "Traceback" not in text
    assert checkpoint.Checkpoints(config.run.dir).steps() == [4]
    goes_on_as_if_nothing_had_been(config, whole)
    case("storage fails once", "one line, exit code 4: launchers start it again; the same curve")


def test_a_data_file_that_is_gone_is_one_line_and_when_it_is_back_the_run_goes_on(
    run_config: Make, whole: list[dict[str, Any]], case: Case, tmp_path: Path
) -> None:
    data = run_config("run").data.model_dump(exclude={"stages"})
    shutil.copytree(Path(data["tokenizer"]).parent, tmp_path / "corpus")
    for source in data["sources"]:
        source["paths"] = source["val_paths"] = [str(tmp_path / "corpus" / source["name"])]
    config = run_config("run", data=data, checkpoint__behind=False)
    assert failing(config, "step: recorded=kill,hit7") == -signal.SIGKILL
    gone, kept = tmp_path / "corpus" / "b" / "1.jsonl.zst", tmp_path / "kept"
    gone.rename(kept)
    code, text = failing(config, ""), log_of(config).read_text()
    assert code in (ExitCode.USER_ERROR, ExitCode.DATA_ERROR), text
    assert str(gone) in text
    assert "Traceback" not in text
    kept.rename(gone)
    goes_on_as_if_nothing_had_been(config, whole)
    case("a data file vanishes", "started again: one line that names it; when it is back: the same curve")


def test_a_damaged_token_cache_is_made_again(
    run_config: Make, whole: list[dict[str, Any]], case: Case, tmp_path: Path
) -> None:
    data = run_config("run").data.model_dump(exclude={"stages"}) | {"token_cache": str(tmp_path / "tokens")}
    config = run_config("run", data=data, checkpoint__behind=False)
    assert failing(config, "step: recorded=kill,hit7") == -signal.SIGKILL
    cached = {path: path.read_bytes() for path in (tmp_path / "tokens").rglob("*") if path.is_file()}
    assert cached
    for path, whole_file in cached.items():
        content = bytearray(whole_file)
        content[len(content) * 3 // 4] ^= 1
        path.write_bytes(content)
    goes_on_as_if_nothing_had_been(config, whole)
    assert any(path.read_bytes() == whole_file for path, whole_file in cached.items())  # those that were needed
    case("token cache damaged", "one warning a chunk, tokenized again; the same curve")


@pytest.mark.parametrize("jump_s", [3e7, -3e7])
def test_a_clock_that_jumps_changes_nothing(
    run_config: Make, whole: list[dict[str, Any]], case: Case, jump_s: float
) -> None:
    """By a year in mid-run, and back for the run's next start."""
    config, clock = run_config("run", recovery__watchdog_s=60.0), time.time

    def run() -> int:
        began = time.monotonic()
        time.time = lambda: clock() + (jump_s if fault_points._fault and fault_points._fault.hits_left < 5 else 0.0)
        assert time.monotonic() >= began
        fault_points.ask("step: recorded=kill,hit10")
        return train(config)

    assert child_process.run(run, log_of(config)) == -signal.SIGKILL
    goes_on_as_if_nothing_had_been(config, whole)
    case(f"the clock jumps by {jump_s / 86400:+.0f} days", "nothing: no decision rests on it; the same curve")


@pytest.mark.multiprocess
def test_a_job_that_is_suspended_and_continued_goes_on(
    run_config: Make, whole: list[dict[str, Any]], case: Case
) -> None:
    """As `scontrol suspend` does; shorter than the watchdog's time."""
    config = run_config("run", recovery__watchdog_s=60.0)
    port, metrics = str(free_port()), Path(config.run.dir) / "metrics.jsonl"

    def start(rank: int) -> int:
        def run() -> int:
            os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            return train(config)

        return child_process.start(run, log_of(config))

    pids = [start(rank) for rank in range(2)]
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") > 3):
        time.sleep(0.01)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in pids:
            os.kill(pid, number)
        time.sleep(1.5)
    assert [child_process.wait(pid) for pid in pids] == [0, 0], log_of(config).read_text()
    same_to_rounding(config, whole)
    case("all processes suspended and continued (SIGSTOP, SIGCONT)", "the run goes on; the same tokens")


@pytest.mark.parametrize("damage", ["a flipped bit", "a torn file", "a missing file"])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(
    run_config: Make, whole: list[dict[str, Any]], case: Case, damage: str
) -> None:
    config = run_config("run", checkpoint__behind=False)
    assert failing(config, "step: recorded=kill,hit10") == -signal.SIGKILL
    newest = checkpoint.Checkpoints(config.run.dir).path(8)
    victim = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    if damage == "a missing file":
        victim.unlink()
    else:
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(bytes(content) if damage == "a flipped bit" else bytes(content[: len(content) // 2]))
    goes_on_as_if_nothing_had_been(config, whole)
    text = log_of(config).read_text()
    assert "it was moved to step-00000008.damaged, and the run goes on from the checkpoint before it" in text
    assert "at step 4 from" in text
    for step in checkpoint.Checkpoints(config.run.dir).steps():  # all of them: to begin anew would lose the run
        (checkpoint.Checkpoints(config.run.dir).path(step) / "meta.json").write_text("{}")
    assert failing(run_config("run", train__steps=20), "") == ExitCode.USER_ERROR
    assert "there is no older one: restore it from a copy" in log_of(config).read_text()
    case(f"checkpoint with {damage}", "one line; set aside, resumed from the checkpoint before it: the same curve")


def ranks(config: RunConfig, faults: dict[int, str], world_size: int = 2) -> list[int]:
    """Exit codes of a run of several processes; a rank that is stopped is killed once the others have left."""
    port = str(free_port())

    def start(rank: int) -> int:
        def run() -> int:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            fault_points.ask(faults.get(rank, ""))
            return train(config)

        return child_process.start(run, log_of(config))

    pids = [start(rank) for rank in range(world_size)]
    codes = {rank: child_process.wait(pids[rank]) for rank in range(world_size) if "stop" not in faults.get(rank, "")}
    for rank in set(range(world_size)) - set(codes):
        os.kill(pids[rank], signal.SIGKILL)
        codes[rank] = child_process.wait(pids[rank])
    return [codes[rank] for rank in range(world_size)]


@pytest.mark.multiprocess
def test_a_rank_that_hangs_ends_the_others_with_the_watchdogs_code(
    run_config: Make, whole: list[dict[str, Any]], case: Case
) -> None:
    config = run_config("run", recovery__watchdog_s=8.0)
    began = time.monotonic()
    codes = ranks(config, {1: "step: batch at hand=stop,hit7"})
    assert codes == [ExitCode.WATCHDOG, -signal.SIGKILL], log_of(config).read_text()
    assert time.monotonic() - began < 250  # a guard against a hang, not a measurement
    report = (Path(config.run.dir) / "log" / "watchdog-rank-00000.txt").read_text()
    assert "since: step 6" in report
    goes_on_as_if_nothing_had_been_to_rounding(config, whole)
    case("a rank hangs (SIGSTOP)", "the others leave with exit code 5 and their stacks; resumed: the same tokens")


@pytest.mark.multiprocess
def test_a_rank_that_is_killed_ends_the_others_with_the_code_for_restart(
    run_config: Make, whole: list[dict[str, Any]], case: Case
) -> None:
    config = run_config("run")
    codes = ranks(config, {1: "step: before the update=kill,hit7"})
    assert codes == [ExitCode.RECOVERABLE, -signal.SIGKILL], log_of(config).read_text()
    goes_on_as_if_nothing_had_been_to_rounding(config, whole)
    case("one rank killed (SIGKILL)", "the others leave with exit code 4; resumed on one process: the same tokens")


def goes_on_as_if_nothing_had_been_to_rounding(config: RunConfig, whole: list[dict[str, Any]]) -> None:
    """Two processes sum up gradients in another order than one."""
    assert child_process.run(lambda: train(config), log_of(config)) == 0, log_of(config).read_text()
    same_to_rounding(config, whole)


def same_to_rounding(config: RunConfig, whole: list[dict[str, Any]]) -> None:
    for record, expected in zip(curve(config), whole, strict=True):
        assert record.get("batch_sha256") == expected.get("batch_sha256")
        if "loss" in record:
            assert record["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_kills_at_random_moments_change_nothing(run_config: Make, whole: list[dict[str, Any]], case: Case) -> None:
    """In CI a few; `HEADRACE_RANDOM_KILLS=200` for a night."""
    kills, runs = int(os.environ.get("HEADRACE_RANDOM_KILLS", "6")), 0
    chance = random.Random(7)
    left = kills
    while left > 0:
        runs += 1
        config = run_config(f"run-{runs}", checkpoint__behind=runs % 2 == 0)
        for _ in range(min(left, 5)):
            left -= 1
            fault = f"{chance.choice(fault_points.POINTS)}=kill,hit{chance.randint(1, 6)}"
            assert failing(config, fault) in (-signal.SIGKILL, 0), log_of(config).read_text()
        goes_on_as_if_nothing_had_been(config, whole)
    case(f"{kills} kills at random points, {runs} runs", "every run ended with the same curve, bit for bit")
