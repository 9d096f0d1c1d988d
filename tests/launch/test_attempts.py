"""One rule for all launchers: what an attempt's exit codes mean, and when a run is given up."""

import json
from pathlib import Path

import pytest

from launch.attempts import AGAIN, FINISHED, GIVE_UP, SAVED, STOP, Attempts, Limits, Outcome, judge, pause_after

FAILED = Outcome(AGAIN, 4, "rank 0 failed first, with exit code 4")


@pytest.mark.parametrize(
    ("codes", "first", "verdict", "code"),
    [
        ([0, 0], None, FINISHED, 0),
        ([4, 4], 1, AGAIN, 4),
        ([1, 5], 1, AGAIN, 5),  # the watchdog was first; its peer only lost the connection
        ([1, 5], None, AGAIN, 1),
        ([4, 2], 0, STOP, 2),
        ([3, None], 0, STOP, 3),
        ([0, None], None, AGAIN, 4),
        ([-9, 4], 0, AGAIN, -9),
        ([0, 137], 1, AGAIN, 137),
    ],
)
def test_exit_codes_become_one_outcome(codes: list, first: int | None, verdict: str, code: int) -> None:
    outcome = judge(dict(enumerate(codes)), first)
    assert (outcome.verdict, outcome.code) == (verdict, code)
    assert outcome.lost == (None in codes and verdict == AGAIN)


def step(run_dir: Path, number: int) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": number, "loss": 1.0}) + "\n" + json.dumps({"step": number + 1, "val_loss": {}}))
        file.write("\n")


def save(run_dir: Path, number: int) -> None:
    (run_dir / "checkpoints" / f"step-{number:08d}").mkdir(parents=True)


def attempt(run_dir: Path, outcome: Outcome = FAILED, limits: Limits | None = None, **what: int) -> str:
    """The verdict on one attempt that got to `step` and saved `checkpoint`."""
    attempts = Attempts(run_dir)
    attempts.start("local", "here:1", ["here"], 2)
    if "step" in what:
        step(run_dir, what["step"])
    if "checkpoint" in what:
        save(run_dir, what["checkpoint"])
    return attempts.end(outcome, limits or Limits(), "here:1").verdict


def test_failing_after_the_same_step_is_given_up(tmp_path: Path) -> None:
    assert [attempt(tmp_path, step=number) for number in (7, 9, 9)] == [AGAIN, AGAIN, GIVE_UP]
    assert "failed 2 times after step 9; giving up" in Attempts(tmp_path).events()[-1]["why"]


def test_the_same_step_counts_though_a_checkpoint_lies_between(tmp_path: Path) -> None:
    """A poisoned batch at step 41: each attempt saves step 40 anew, and fails."""
    assert attempt(tmp_path, step=41, checkpoint=40) == AGAIN
    assert attempt(tmp_path, step=41, checkpoint=41) == GIVE_UP


def test_attempts_without_a_step_count_as_failures_only(tmp_path: Path) -> None:
    step(tmp_path, 5)  # of a run before
    assert [attempt(tmp_path) for _ in range(4)] == [AGAIN] * 3 + [GIVE_UP]
    assert [end["step"] for end in Attempts(tmp_path).events() if end["event"] == "end"] == [None] * 4


def test_a_traceback_before_the_first_step_ends_a_run_when_it_comes_twice(tmp_path: Path) -> None:
    traceback = Outcome(AGAIN, 1, "rank 0 failed first, with exit code 1")
    assert attempt(tmp_path) == AGAIN  # a rendezvous that failed is not the same failure
    assert [attempt(tmp_path, traceback) for _ in range(2)] == [AGAIN, GIVE_UP]


def test_a_resume_that_only_cut_off_superseded_records_did_no_step(tmp_path: Path) -> None:
    save(tmp_path, 4)
    step(tmp_path, 5)
    attempts = Attempts(tmp_path)
    attempts.start("local", "here:1", ["here"], 2)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 3, "loss": 1.0}) + "\n")
    attempts.end(FAILED, Limits(), "here:1")
    assert attempts.events()[-1]["step"] is None


def test_lost_nodes_are_not_a_fault_at_a_step(tmp_path: Path) -> None:
    lost = Outcome(AGAIN, 4, "lost", lost=True)
    assert [attempt(tmp_path, lost, step=9) for _ in range(2)] == [AGAIN] * 2
    assert attempt(tmp_path, step=9) == AGAIN
    assert attempt(tmp_path, step=9) == GIVE_UP


def test_a_person_who_launches_again_starts_the_counts_anew(tmp_path: Path) -> None:
    limits = Limits(max_failures=1)
    assert [attempt(tmp_path, limits=limits) for _ in range(2)] == [AGAIN, GIVE_UP]
    Attempts(tmp_path).note("submitted", jobs=["here:1"])
    assert attempt(tmp_path, limits=limits) == AGAIN


def test_saving_before_the_time_limit_is_no_failure(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    for _ in range(9):
        attempts.start("slurm", "7", ["a"], 2)
        assert attempts.end(FAILED, Limits(), "7", saved=True).verdict == SAVED
    lost = Outcome(AGAIN, 4, lost=True)
    attempts.start("slurm", "7", ["a"], 2)
    save(tmp_path, 8)
    assert attempts.end(lost, Limits(), "7", saved=True).verdict == SAVED  # killed on its way out, after saving
    attempts.start("slurm", "7", ["a"], 2)
    assert attempts.end(lost, Limits(), "7", saved=True).verdict == AGAIN
    attempts.start("slurm", "7", ["a"], 2)
    assert attempts.end(Outcome(AGAIN, 139), Limits(), "7", saved=True).verdict == AGAIN  # it crashed instead


def test_what_was_cancelled_is_not_tried_again(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    attempts.note("submitted", jobs=["7"])
    attempts.start("slurm", "7", ["a"], 2)
    attempts.note("cancel")
    assert attempts.end(FAILED, Limits(), "7", saved=True).verdict == STOP
    assert attempts.begin("7", Limits()).verdict == STOP


def test_a_torn_note_is_passed_over(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    attempts.note("submitted", jobs=["7"])
    with attempts.path.open("a") as file:
        file.write('{"event": "sta\n')
    assert attempt(tmp_path) == AGAIN
    assert [event["event"] for event in attempts.events()] == ["submitted", "start", "end"]


def test_pauses() -> None:
    assert [pause_after(failures) for failures in range(1, 9)] == [1, 2, 4, 8, 16, 32, 60, 60]
