"""Whole runs of a small model on the small corpus, and what they recorded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import child_process

from data_scheduler import DataConfig
from pretrain.config import RunConfig, validate_config
from pretrain.metrics import read_records
from pretrain.metrics.registry import OF_MACHINE
from pretrain.train import train

STEPS = 12
Make = Callable[..., RunConfig]


def maker(data_config: Callable[..., DataConfig], root: Path, **usual: Any) -> Make:
    """Makes the configuration of a small run in `root/<name>`; `section__key` arguments override, those of `usual` in
    every run."""

    def make(name: str, **changes: Any) -> RunConfig:
        data = data_config(seq_len=32, global_batch_size=8, lanes=8, prefetch=2).model_dump(exclude={"stages"})
        for source in data["sources"]:
            source["val_paths"] = source["paths"]
        raw: dict[str, Any] = {
            "run": {"dir": str(root / name)},
            "model": {
                "family": "llama",
                "num_layers": 2,
                "hidden_size": 32,
                "num_attention_heads": 4,
                "num_query_groups": 2,
                "ffn_hidden_size": 64,
                "tie_embeddings": True,
            },
            "data": data,
            "train": {"steps": STEPS, "micro_batch_size": 2, "eval_sequences": 2, "threads": 1},
            "optimizer": {"lr": 1e-2, "warmup_steps": 2},
            "checkpoint": {"every": 4},
            "metrics": {"progress": False},
        }
        for key, value in (usual | changes).items():
            section, _, rest = key.partition("__")
            if rest:
                raw.setdefault(section, {})[rest] = value
            else:
                raw[section] = value
        return validate_config(raw, "test")

    return make


def curve(config: RunConfig) -> list[dict[str, Any]]:
    """The training records without what a clock shapes, and the evaluations."""
    records = read_records(Path(config.run.dir) / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key not in OF_MACHINE} for record in records]


def run_to_end(config: RunConfig) -> str:
    """Train in a process of its own; what it said."""
    log = Path(config.run.dir).with_suffix(".log")
    assert child_process.run(lambda: train(config), log) == 0, log.read_text()
    return log.read_text()


def go(config: RunConfig) -> int:
    """Train in this process; the exit code."""
    return int(train(config))
