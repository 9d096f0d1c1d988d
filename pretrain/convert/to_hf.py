"""A checkpoint of a run as a Hugging Face model folder."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from headrace.errors import ConfigError
from pretrain.convert.architecture import hf_family, to_hf_config
from pretrain.convert.native import NativeReader
from pretrain.convert.safetensors_folder import SHARD_BYTES, SafetensorsWriter
from pretrain.convert.stored_model import find_model
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
    out = _check_target(out, force)
    stored = find_model(run, step)
    hf_family(stored.model)
    if stored.model.mtp is not None:
        sys.stderr.write(
            f"headrace: {stored.checkpoint}: the multi-token heads (model.mtp) are left out, the model is whole\n"
        )
    tokenizer = stored.tokenizer(tokenizer)
    encoder = load_tokenizer(tokenizer, stored.vocab_size)
    natives = list(native_tensors(stored.model, stored.vocab_size))
    weights = NativeReader(stored.checkpoint, natives)
    hf_config = to_hf_config(stored.model, stored.vocab_size, stored.seq_len, weights.dtype, encoder)
    generation = {"bos_token_id": encoder.bos_id, "eos_token_id": encoder.eos_id}
    shapes = [(part.name, part.shape) for native in natives for part in native.parts]

    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        copy_tokenizer(tokenizer, encoder, partial)
        for file in code_files(hf_config):
            shutil.copyfile(file, partial / file.name)
        writer = SafetensorsWriter(partial, shapes, weights.dtype, shard_bytes)
        for native in natives:
            whole = weights.read(native)
            for part in native.parts:
                writer.add(part.name, take(whole, part))
            del whole  # before the next is read: the peak is twice the largest tensor, not three times
        writer.close()
        _write_json(partial / "config.json", hf_config)
        _write_json(partial / "generation_config.json", generation)
        _put_in_place(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out


def code_files(hf_config: dict[str, Any]) -> list[Path]:
    """The Python files that transformers needs for a `config.json`; none but for what it does not have itself."""
    modules = {name.split(".")[0] for name in hf_config.get("auto_map", {}).values()}
    return [Path(__file__).parent / "wonton" / f"{module}.py" for module in sorted(modules)]


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
