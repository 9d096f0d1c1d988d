"""Short tasks are silent; long ones draw a bar on a terminal and write lines elsewhere."""

import os
import pty

import pytest

from data_scheduler import progress
from data_scheduler.progress import Task


def test_short_tasks_say_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with Task("opening", 10) as task:
        for _ in range(10):
            task.advance()
    assert capfd.readouterr().err == ""


def test_long_tasks_write_lines_where_there_is_no_terminal(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SHOWN_AFTER", 0.0)
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    with Task("opening", 4) as task:
        for _ in range(4):
            task.advance()
    assert capfd.readouterr().err.splitlines() == [
        *(f"headrace: opening: {percent} %" for percent in (25, 50, 75, 100)),
        "headrace: opening: done in 0 s",
    ]


@pytest.mark.parametrize("plain", [False, True])
def test_a_terminal_gets_a_bar_unless_lines_are_asked_for(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SHOWN_AFTER", 0.0)
    main, side = pty.openpty()
    with os.fdopen(side, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        with Task("opening", 4, plain=plain) as task:
            task.advance(4)
    shown = os.read(main, 100_000).decode()
    os.close(main)
    assert "opening" in shown
    assert ("\x1b[" in shown) is not plain
