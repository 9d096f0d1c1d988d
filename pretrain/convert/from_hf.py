"""A Hugging Face model folder as step 0 of a new run: weights without optimizer state."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from headrace.errors import CheckpointError
from pretrain.config import ModelConfig
from pretrain.convert.architecture import COMMON_DEFAULTS, from_hf_config
from pretrain.convert.new_run import check_new, new_run
from pretrain.convert.safetensors_folder import SafetensorsReader
from pretrain.convert.tensors import Native, join, native_tensors
from pretrain.convert.tokenizer_files import load_tokenizer


def from_hf(folder: Path, run: Path) -> ModelConfig:
    """Make the run folder `run`, whose step 0 has the weights of `folder`, and return the model they belong to.

    `headrace train` with that model and `run.dir` set to `run` starts from the weights, under any layout and in any
    precision, with a fresh optimizer. Weights keep their type; float16 becomes float32, as does a mixture of types
    (both exactly). Raises CheckpointError or ConfigError, naming the file, when something is missing or cannot be
    represented, and OSError.
    """
    config = read_hf_config(folder)
    model = from_hf_config(config, str(folder / "config.json"))
    assert model.vocab_size is not None
    natives = list(native_tensors(model, model.vocab_size))
    parts = [part for native in natives for part in native.parts]
    weights = SafetensorsReader(folder)
    # A tied head may be stored besides; transformers ignores it too.
    weights.check(parts, ignored=["lm_head.weight"] if model.tie_embeddings else [])
    dtype = weights.dtype(parts)
    tokenizer = tokenizer_of(folder)
    if tokenizer is not None:
        load_tokenizer(tokenizer, model.vocab_size)
    check_new(run)

    def make(native: Native) -> torch.Tensor:
        return join(native, lambda part: weights.read(part.name), dtype)

    seq_len = config.get("max_position_embeddings", COMMON_DEFAULTS["max_position_embeddings"])
    new_run(run, model, natives, dtype, make, seq_len, tokenizer)
    return model


def read_hf_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of `folder`. Raises CheckpointError."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        what = "no config.json in it" if folder.is_dir() else "no such folder"
        raise CheckpointError(f"{folder}: not a Hugging Face model folder ({what})") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: not a model configuration")
    return config


def tokenizer_of(folder: Path) -> Path | None:
    """`folder`, absolute, when there is a tokenizer in it."""
    there = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    return Path(os.path.abspath(folder)) if there else None
