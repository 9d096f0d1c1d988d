"""Progress: a live line on a real terminal, plain lines without one."""

import io
import os
import pty
import re
import subprocess
import sys
import textwrap

import pytest
from rich.console import Console

from pretrain.progress import Progress, clock_time, short


def record(step: int, **more) -> dict:
    return {
        "step": step,
        "loss": 5.0 - step / 100,
        "tokens_per_s": 2000.0,
        "data_wait_s": 0.02,
        "source_tokens": {"code": 1000, "prose": 1000},
        **more,
    }


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def lines_of(steps: int, seconds_per_step: float, start: int = 0, **more) -> list[str]:
    out, clock = io.StringIO(), Clock()
    with Progress(steps, start, console=Console(file=out), clock=clock) as progress:
        for step in range(start, steps):
            clock.now += seconds_per_step
            progress.update(record(step, **more))
    return out.getvalue().splitlines()


def test_plain_lines_come_first_last_and_by_time() -> None:
    lines = lines_of(30, seconds_per_step=1.0)
    assert [line.split()[1] for line in lines] == ["1/30", "11/30", "21/30", "30/30"]
    assert lines[1] == "step 11/30  loss 4.9000  2.00k tok/s  data wait 2.0%  0:19 left"
    assert lines[-1] == "step 30/30  loss 4.7100  2.00k tok/s  data wait 2.0%"


def test_time_left_after_a_resume_counts_only_this_process() -> None:
    lines = lines_of(104, seconds_per_step=10.0, start=100)
    assert lines[0].endswith("0:30 left")


def test_time_left_goes_by_tokens_where_steps_are_unequal() -> None:
    """Ten steps of 1,000 tokens, then ten of 3,000: after five of the first, 35 of 40 parts are left."""
    out, clock = io.StringIO(), Clock()

    def given(step: int) -> int:
        return 1000 * step + 2000 * max(0, step - 10)

    with Progress(20, console=Console(file=out), every_s=0.0, clock=clock, given=given) as progress:
        for step in range(5):
            clock.now += 1.0
            progress.update(record(step))
    assert out.getvalue().splitlines()[-1].endswith("0:35 left")


def test_the_wait_is_a_share_of_the_step_when_its_time_is_known() -> None:
    assert "data wait 50.0%" in lines_of(1, 1.0, step_s=0.04)[0]


def test_the_slow_first_step_is_forgotten() -> None:
    out = io.StringIO()
    with Progress(3, console=Console(file=out), every_s=0.0) as progress:
        for step, speed in enumerate((10.0, 1000.0, 2000.0)):
            progress.update(record(step, tokens_per_s=speed))
    assert [re.search(r"(\S+) tok/s", line)[1] for line in out.getvalue().splitlines()] == ["10", "1.00k", "1.10k"]


def test_notes_and_evaluations_are_printed_as_they_are() -> None:
    out = io.StringIO()
    with Progress(3, console=Console(file=out)) as progress:
        progress.note("[red]kept[/red] as is")
        progress.evaluated({"step": 2, "val_loss": {"code": 4.25, "prose": 5.0}})
    assert out.getvalue().splitlines() == [
        "[red]kept[/red] as is",
        "step 2/3  validation loss: code 4.2500  prose 5.0000",
    ]


CHILD = """
    import sys
    from pretrain.progress import Progress
    with Progress(5, enabled={enabled}) as progress:
        for step in range(5):
            progress.update(dict(step=step, loss=4.5, tokens_per_s=1500.0, data_wait_s=0.0, source_tokens=dict(a=10)))
            if step == 2:
                progress.note("checkpoint at step 3")
"""


def run_on_terminal(enabled: bool, term: str = "xterm-256color") -> str:
    ours, theirs = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE")}
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHILD.format(enabled=enabled))],
        stderr=theirs, stdout=theirs, env={**environment, "TERM": term, "COLUMNS": "100"},
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 65536):
            shown += chunk
    except OSError:  # EIO: the child has closed its side
        pass
    os.close(ours)
    assert child.wait() == 0
    return shown.decode()


def test_a_terminal_gets_a_bar_and_keeps_the_notes() -> None:
    shown = run_on_terminal(enabled=True)
    assert "━" in shown
    assert "\x1b[?25l" in shown  # the cursor is hidden while the line redraws itself, and comes back
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    assert "checkpoint at step 3" in shown
    assert "step 5/5  loss 4.5000  1.50k tok/s  data wait 0.0%" in shown


@pytest.mark.parametrize(("enabled", "term"), [(False, "xterm-256color"), (True, "dumb")])
def test_no_bar_when_switched_off_or_on_a_dumb_terminal(enabled: bool, term: str) -> None:
    shown = run_on_terminal(enabled, term)
    assert "━" not in shown
    assert "\x1b" not in shown
    assert [line.split("  ")[0] for line in shown.split("\r\n")] == ["step 1/5", "checkpoint at step 3", "step 5/5", ""]


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999.4, "999"), (999.6, "1.00k"), (1500, "1.50k"), (99_960, "100k"), (3.2e6, "3.20M"), (2e12, "2.00T")],
)
def test_short(number: float, text: str) -> None:
    assert short(number) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3723, "1:02:03"), (273_900, "3d 04:05")])
def test_clock_time(seconds: float, text: str) -> None:
    assert clock_time(seconds) == text
