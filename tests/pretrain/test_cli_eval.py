"""`headrace eval` where there is nothing to score, or nothing to score with: one line, exit code 2."""

import sys
from pathlib import Path

import pytest
from refused_command import refusal

from headrace.errors import ConfigError
from pretrain.evaluation.score import import_lm_eval


def test_without_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: str) -> str:
        return refusal(["eval", *arguments], monkeypatch, capfd)

    assert f"{tmp_path}: no checkpoint in this run folder" in said(str(tmp_path), "--tasks", "piqa")
    assert "no such run folder" in said(str(tmp_path / "nowhere"), "--tasks", "piqa")
    (tmp_path / "config.json").write_text("{}")
    assert "name one task at least" in said(str(tmp_path), "--tasks", " , ")
    assert "--step" in said(str(tmp_path), "--tasks", "headrace_tiny", "--step", "-1")
    assert not (tmp_path / "evaluations").exists()


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'headrace\[eval\]'"):
        import_lm_eval()
