"""A checkpoint of a run as a Hugging Face model folder."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from headrace.errors import CheckpointError, ConfigError
from pretrain.checkpoint import Checkpoints, model_of_stage, read_meta
from pretrain.config import ModelConfig
from pretrain.convert.architecture import hf_family, to_hf_config
from pretrain.convert.native import NativeReader
from pretrain.convert.safetensors_folder import SHARD_BYTES, SafetensorsWriter
from pretrain.convert.tensors import native_tensors, take
from pretrain.convert.tokenizer_files import copy_tokenizer, load_tokenizer


def to_hf(
    run: Path,
    step: int | None,
    out: Path,
    tokenizer: Path | None = None,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write the checkpoint of `step` (the newest when None) of `run` to the folder `out`, and return its path.

    The weights keep their type and their padded vocabulary, so that converting back gives the same bits. `tokenizer`
    replaces the path that the run's configuration has. `out` is there when it is complete and not before; `force`
    replaces a model folder that is there already. Raises CheckpointError, ConfigError or OSError.
    """
    checkpoint = _find(run, step)
    out = _check_target(out, force)
    meta = read_meta(checkpoint)
    model, vocab_size, config = _model(meta, checkpoint)
    model = model_of_stage(model, meta)
    seq_len = meta.get("stage", {}).get("seq_len", config["data"]["seq_len"])
    if model.mup:
        raise ConfigError(f"{run}: model.mup: the Hugging Face format has no place for its attention and logit factors")
    hf_family(model)
    if model.mtp is not None:
        sys.stderr.write(
            f"headrace: {checkpoint}: the multi-token heads (model.mtp) are left out, the model is whole\n"
        )
    tokenizer = _tokenizer_path(config, tokenizer)
    encoder = load_tokenizer(tokenizer, vocab_size)
    natives = list(native_tensors(model, vocab_size))
    weights = NativeReader(checkpoint, natives)
    hf_config = to_hf_config(model, vocab_size, seq_len, weights.dtype, encoder)
    generation = {"bos_token_id": encoder.bos_id, "eos_token_id": encoder.eos_id}

    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        copy_tokenizer(tokenizer, encoder, partial)
        writer = SafetensorsWriter(partial, shard_bytes)
        for native in natives:
            whole = weights.read(native)
            for part in native.parts:
                writer.add(part.name, take(whole, part))
        writer.close()
        _write_json(partial / "config.json", hf_config)
        _write_json(partial / "generation_config.json", generation)
        _put_in_place(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out


def _find(run: Path, step: int | None) -> Path:
    checkpoints = Checkpoints(run)
    steps = checkpoints.steps()
    if not steps:
        what = "no checkpoint in this run folder" if run.is_dir() else "no such run folder"
        raise CheckpointError(f"{run}: {what}")
    if step is not None and step not in steps:
        raise CheckpointError(f"{run}: no checkpoint of step {step}; there are {', '.join(map(str, steps))}")
    return checkpoints.path(steps[-1] if step is None else step)


def _model(meta: dict[str, Any], checkpoint: Path) -> tuple[ModelConfig, int, dict[str, Any]]:
    """(model, padded vocabulary, configuration) of a checkpoint."""
    try:
        config: dict[str, Any] = meta["config"]
        return ModelConfig.model_validate(config["model"]), int(meta["model"]["vocab_size"]), config
    except (KeyError, TypeError, ValidationError):
        raise CheckpointError(f"{checkpoint / 'meta.json'}: not of this version of Headrace") from None


def _tokenizer_path(config: dict[str, Any], tokenizer: Path | None) -> Path:
    if tokenizer is not None:
        return tokenizer
    configured = config["data"]["tokenizer"]
    if configured is None:
        raise ConfigError("the checkpoint was converted from a folder without a tokenizer; name one with --tokenizer")
    if not Path(configured).exists():
        raise ConfigError(f"data.tokenizer of the run, {configured}, is not there; name it with --tokenizer")
    return Path(configured)


def _check_target(out: Path, force: bool) -> Path:
    """`out` as an absolute path; raises ConfigError when something is there that must not be replaced."""
    out = Path(os.path.abspath(out))
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return out
    if not (out / "config.json").is_file():
        raise ConfigError(f"--out {out}: is there and is not a model folder; name another")
    if not force:
        raise ConfigError(f"--out {out}: holds a model; name another folder, or replace it with --force")
    return out


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def _put_in_place(partial: Path, out: Path) -> None:
    """Rename `partial` to `out`; a model that was there goes when the new one has its name."""
    replaced = out.with_name(out.name + ".replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if out.exists():
        out.rename(replaced)
    partial.rename(out)
    shutil.rmtree(replaced, ignore_errors=True)
