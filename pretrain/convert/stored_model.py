"""Which model a run's checkpoint holds: from `meta.json`, without opening the weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from headrace.errors import CheckpointError, ConfigError
from pretrain.checkpoint import Checkpoints, model_of_stage, read_meta
from pretrain.config import ModelConfig


@dataclass(frozen=True)
class StoredModel:
    """The model of one checkpoint."""

    checkpoint: Path
    model: ModelConfig
    """With the rotary embedding of the stage that trained the weights last."""
    vocab_size: int
    """Padded."""
    seq_len: int
    meta: dict[str, Any]

    def tokenizer(self, named: Path | None = None) -> Path:
        """The tokenizer's path: `named`, or the one of the run. Raises ConfigError when there is none."""
        if named is not None:
            return named
        configured = self.meta["config"]["data"]["tokenizer"]
        if configured is None:
            raise ConfigError("the checkpoint was converted without a tokenizer; name one with --tokenizer")
        if not Path(configured).exists():
            raise ConfigError(f"data.tokenizer of the run, {configured}, is not there; name it with --tokenizer")
        return Path(configured)


def find_checkpoint(run: Path, step: int | None) -> Path:
    """The checkpoint of `step`, the newest when None. Raises CheckpointError when there is none."""
    checkpoints = Checkpoints(run)
    steps = checkpoints.steps()
    if not steps:
        what = "no checkpoint in this run folder" if run.is_dir() else "no such run folder"
        raise CheckpointError(f"{run}: {what}")
    if step is not None and step not in steps:
        raise CheckpointError(f"{run}: no checkpoint of step {step}; there are {', '.join(map(str, steps))}")
    return checkpoints.path(steps[-1] if step is None else step)


def find_model(run: Path, step: int | None) -> StoredModel:
    """The model in the checkpoint of `step` of `run`, the newest when None. Raises CheckpointError."""
    checkpoint = find_checkpoint(run, step)
    meta = read_meta(checkpoint)
    try:
        config = meta["config"]
        model = ModelConfig.model_validate(config["model"])
        seq_len = meta.get("stage", {}).get("seq_len", config["data"]["seq_len"])
        return StoredModel(checkpoint, model_of_stage(model, meta), int(meta["model"]["vocab_size"]), seq_len, meta)
    except (AttributeError, KeyError, TypeError, ValidationError):
        raise CheckpointError(f"{checkpoint / 'meta.json'}: not of this version of Headrace") from None
