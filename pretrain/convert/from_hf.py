"""A Hugging Face model folder as step 0 of a new run: weights without optimizer state."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from headrace.errors import CheckpointError, ConfigError
from headrace.version import __version__
from pretrain.checkpoint import Checkpoints, model_identity
from pretrain.checkpoint_saving import publish
from pretrain.config import ModelConfig
from pretrain.convert.architecture import COMMON_DEFAULTS, from_hf_config
from pretrain.convert.native import write_weights
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
    config = _read_config(folder)
    model = from_hf_config(config, str(folder / "config.json"))
    assert model.vocab_size is not None
    natives = list(native_tensors(model, model.vocab_size))
    parts = [part for native in natives for part in native.parts]
    weights = SafetensorsReader(folder)
    # A tied head may be stored besides; transformers ignores it too.
    weights.check(parts, ignored=["lm_head.weight"] if model.tie_embeddings else [])
    dtype = weights.dtype(parts)
    tokenizer = _tokenizer(folder)
    if tokenizer is not None:
        load_tokenizer(tokenizer, model.vocab_size)
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise ConfigError(f"--out {run}: is there already; name a new run folder")

    def make(native: Native) -> torch.Tensor:
        return join(native, lambda part: weights.read(part.name), dtype)

    final = Checkpoints(run).path(0)
    partial = final.with_name(final.name + ".partial")
    partial.mkdir(parents=True)
    try:
        write_weights(partial, natives, dtype, make)
        publish(partial, final, _meta(config, model, model.vocab_size, dtype, tokenizer))
    except BaseException:
        shutil.rmtree(final.parent, ignore_errors=True)
        raise
    return model


def model_section(model: ModelConfig) -> str:
    """`model` as the section of a run's configuration, YAML; what is left out has its default value."""
    return yaml.safe_dump({"model": model.model_dump(mode="json", exclude_defaults=True)}, sort_keys=False)


def _meta(
    config: dict[str, Any], model: ModelConfig, vocab_size: int, dtype: torch.dtype, tokenizer: Path | None
) -> dict[str, Any]:
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    seq_len = config.get("max_position_embeddings", COMMON_DEFAULTS["max_position_embeddings"])
    data = {"tokenizer": None if tokenizer is None else str(tokenizer), "seq_len": seq_len}
    return {
        "version": __version__,
        "step": 0,
        "tokens": 0,
        "weights_only": True,
        "model": model_identity(model, vocab_size, precision),
        "config": {"model": model.model_dump(mode="json"), "data": data},
    }


def _read_config(folder: Path) -> dict[str, Any]:
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


def _tokenizer(folder: Path) -> Path | None:
    """`folder`, absolute, when there is a tokenizer in it."""
    there = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    return Path(os.path.abspath(folder)) if there else None
