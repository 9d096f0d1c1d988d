"""Fixtures that several files here share."""

from pathlib import Path

import pytest
from fake_slurm import FakeSlurm

CONFIG = """
run: {dir: RUN}
model: {family: llama, num_layers: 4, hidden_size: 64, num_attention_heads: 4, ffn_hidden_size: 128}
data: {tokenizer: t.json, sources: [{name: a, paths: [a.jsonl]}], seq_len: 64, global_batch_size: 8, lanes: 8}
train: {steps: 2}
"""


@pytest.fixture
def slurm(tmp_path: Path) -> FakeSlurm:
    return FakeSlurm(tmp_path / "slurm")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "runs" / "mill"
    (path / "log").mkdir(parents=True)
    return path


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration in `tmp_path`, which is the working directory; its run folder is `runs/mill`."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mill.yaml"
    path.write_text(CONFIG.replace("RUN", "runs/mill"))
    return path
