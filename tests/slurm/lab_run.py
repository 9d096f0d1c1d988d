"""A run small enough for four processes on two cores, and what it trained on."""

import json
import os
import subprocess
from pathlib import Path

from launch.attempts import Attempts

STEPS = 36


def write_config(corpus: Path, path: Path, run_dir: Path, **train: object) -> Path:
    """A configuration that fits 1, 2, 3 and 4 processes."""
    settings = {
        "run": {"dir": str(run_dir)},
        "model": {
            "family": "llama",
            "num_layers": 2,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "ffn_hidden_size": 128,
        },
        "data": {
            "tokenizer": str(corpus / "tokenizer.json"),
            "sources": [{"name": name, "paths": [str(corpus / name)]} for name in "ab"],
            "seq_len": 64,
            "global_batch_size": 12,
            "lanes": 12,
            "chunk_bytes": 8192,
        },
        "train": {"steps": STEPS, "micro_batch_size": 1, **train},
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"every": 12},
        "metrics": {"progress": False},
    }
    path.write_text(json.dumps(settings))  # which is YAML too
    return path


def train_here(python: str, environment: dict[str, str], config: Path) -> None:
    """The same run in one process, never interrupted."""
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [python, "-m", "pretrain", "train", str(config)]
    subprocess.run(command, env={**alone, **environment}, check=True, timeout=600)


def hashes(run_dir: Path) -> list[tuple[int, str]]:
    """(step, SHA-256 of its tokens) of every step."""
    path = run_dir / "metrics.jsonl"
    records = (
        [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    )
    return [(record["step"], record["batch_sha256"]) for record in records if "loss" in record]


def losses(run_dir: Path) -> list[float]:
    """Training loss of every step."""
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


def attempts(run_dir: Path, event: str) -> list[dict]:
    """The run's notes of one kind."""
    return [note for note in Attempts(run_dir).events() if note["event"] == event]


def verdicts(run_dir: Path) -> list[str]:
    """How the attempts ended."""
    return [note["verdict"] for note in attempts(run_dir, "end")]
