"""A run folder whose step 0 has weights that come from elsewhere, and no optimizer state."""

import contextlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import yaml

from headrace.errors import ConfigError
from headrace.version import __version__
from pretrain.checkpoint import Checkpoints, model_identity
from pretrain.checkpoint_saving import publish
from pretrain.config import ModelConfig
from pretrain.convert.native import write_weights
from pretrain.convert.tensors import Native


def check_new(run: Path) -> None:
    """Raise ConfigError when something is in the folder `run`."""
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise ConfigError(f"--out {run}: is there already; name a new run folder")


def new_run(
    run: Path,
    model: ModelConfig,
    natives: Sequence[Native],
    dtype: torch.dtype,
    make: Callable[[Native], torch.Tensor],
    seq_len: int,
    tokenizer: Path | None,
) -> None:
    """Write `natives`, each of which `make` gives when it is due, as step 0 of the run folder `run`. Raises OSError.

    When anything goes wrong nothing is left there.
    """
    assert model.vocab_size is not None
    final = Checkpoints(run).path(0)
    partial = final.with_name(final.name + ".partial")
    partial.mkdir(parents=True)
    meta = {
        "version": __version__,
        "step": 0,
        "tokens": 0,
        "weights_only": True,
        "model": model_identity(model, model.vocab_size, "bf16" if dtype == torch.bfloat16 else "fp32"),
        "config": {
            "model": model.model_dump(mode="json"),
            "data": {"tokenizer": None if tokenizer is None else str(tokenizer), "seq_len": seq_len},
        },
    }
    try:
        write_weights(partial, natives, dtype, make)
        publish(partial, final, meta)
    except BaseException:
        shutil.rmtree(final.parent, ignore_errors=True)
        with contextlib.suppress(OSError):
            run.rmdir()
        raise


def model_section(model: ModelConfig) -> str:
    """`model` as the section of a run's configuration, YAML; what is left out has its default value."""
    return yaml.safe_dump({"model": model.model_dump(mode="json", exclude_defaults=True)}, sort_keys=False)
