"""A command that a person got wrong: what it says, in one line, on exit code 2."""

import sys
from collections.abc import Sequence

import pytest

from pretrain import cli


def refusal(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> str:
    """What `headrace` with these arguments says."""
    monkeypatch.setattr(sys, "argv", ["headrace", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1, said
    return said
