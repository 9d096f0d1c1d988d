"""Checkpoints: sharded by megatron-core, whole or not there, found without being told.

    <run>/checkpoints/step-00000100/         complete: the folder got this name when everything in it was on disk
        .metadata, common.pt, *.distcp       weights and optimizer state, loadable under any layout
        data_state.npz                       the scheduler's position
        rng/rank-00000.pt                    random state of each process
        meta.json                            step, tokens, model, layout, versions
    <run>/checkpoints/step-00000200.partial/ a save that was cut short; ignored, and removed by the next save

A checkpoint belongs to `step` done steps: training goes on with step number `step`. One that was converted from
another format holds weights only (`"weights_only": true` in meta.json, no optimizer state, data state or random state):
training starts from it with a fresh optimizer and the first data.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

from data_scheduler.state import Snapshots, load_state, save_state
from headrace.errors import CheckpointError
from headrace.version import __version__
from parallel import accelerator, exchange
from parallel.engine import dist_checkpointing, parallel_state
from parallel.layout import Layout
from parallel.whole_parameter_optimizer import WholeParameterOptimizer
from pretrain.complete_checkpoints import complete_steps
from pretrain.config import ModelConfig
from pretrain.config.rope import RopeScalingConfig
from pretrain.data_parallel import gather_weights
from pretrain.models.sizes import activation, head_size
from pretrain.optimizer_state import fp32_weights_name, load_from_other_form
from pretrain.step import TrainState
from pretrain.stored_optimizer import restore_optimizer, stored_optimizer

FULL_BYTES = 1 << 20
"""A disk with less free space than this is called full."""
SHARDING: dict[str, Any] = {
    "singleton_local_shards": False,
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int
    """Optimizer steps done."""
    tokens: int
    """Target tokens trained on."""


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, run_dir: str | Path) -> None:
        self.run_dir = Path(run_dir)
        self.folder = self.run_dir / "checkpoints"

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        return complete_steps(self.run_dir)

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of `step`."""
        return self.folder / f"step-{step:08d}"

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def save(self, state: TrainState, data_state: Mapping[str, Any], progress: Progress, keep_last: int) -> Path:
        """Write a checkpoint on all ranks together; it exists from the moment its folder is renamed.

        `data_state` holds all lanes. Raises CheckpointError on every rank when any could not write; checkpoints that
        were complete stay.
        """
        final = self.path(progress.step)
        partial = final.with_name(final.name + ".partial")
        exchange.only_first_rank(lambda: self._prepare(partial), state.ranks.rank)
        try:
            exchange.agree(lambda: _write(partial, state))
            exchange.only_first_rank(lambda: _finish(partial, final, state, data_state, progress), state.ranks.rank)
        except OSError as error:
            raise CheckpointError(
                f"checkpoint of step {progress.step} not written: {_reason(error, partial)}"
            ) from None
        exchange.only_first_rank(lambda: self._retire(keep_last, data_state), state.ranks.rank)
        return final

    def _prepare(self, partial: Path) -> None:
        for leftover in self.folder.glob("*.partial"):
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)

    def _retire(self, keep_last: int, data_state: Mapping[str, Any]) -> None:
        Snapshots(self.run_dir).save(data_state)
        for step in self.steps()[:-keep_last] if keep_last else []:
            shutil.rmtree(self.path(step))


def read_meta(path: Path) -> dict[str, Any]:
    """A checkpoint's `meta.json`. Raises CheckpointError."""
    try:
        meta: dict[str, Any] = json.loads((path / "meta.json").read_text())
        return meta
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a complete checkpoint: {error}") from None


def load(path: Path, state: TrainState) -> tuple[Progress, dict[str, Any] | None]:
    """Put a checkpoint's weights and optimizer state into `state`; returns progress and data state.

    Any layout can load any other's. Of a checkpoint of weights only, the optimizer starts anew from the weights, which
    may be of another precision, and the data state is None. Raises CheckpointError when it is of another model or
    damaged.
    """
    meta = read_meta(path)
    check_model(path, meta, state)
    weights_only = meta.get("weights_only", False)
    wanted = sharded_state(state, loading=True)
    if weights_only:
        del wanted["optimizer"]
        _load(path, wanted, state)
        state.optimizer.reload_model_params()
        return Progress(meta["step"], meta["tokens"]), None
    now, there = (
        fp32_weights_name(distributed, state.config.train.precision)
        for distributed in (state.layout.distributed_optimizer, meta["layout"]["distributed_optimizer"])
    )
    if now == there or isinstance(state.optimizer, WholeParameterOptimizer):  # which has one form
        optimizer = _load(path, wanted, state)["optimizer"]
    else:
        other_form = wanted.pop("optimizer")
        _load(path, wanted, state)
        optimizer = _reading(path, lambda: load_from_other_form(path, other_form, now, there))
    restore_optimizer(state, optimizer)
    if "noise_scale" in meta:  # older checkpoints have none
        state.noise_scale.load(meta["noise_scale"])
    rng = path / "rng" / f"rank-{state.ranks.rank:05d}.pt"
    # Fields of a layout that came after the checkpoint have their defaults there.
    same_layout = asdict(Layout(1)) | meta["layout"] == asdict(state.layout)
    if same_layout and rng.is_file():
        try:
            accelerator.set_rng_state(torch.load(rng, weights_only=True))
        except Exception as error:  # unpickling and setting raise half a dozen kinds for damaged bytes
            raise _damaged(rng, type(error).__name__) from error
    return Progress(meta["step"], meta["tokens"]), load_state(path / "data_state.npz")


def load_weights(path: Path, state: TrainState) -> None:
    """Put a checkpoint's weights alone into a model of the same sizes, under any layout. Raises CheckpointError."""
    _load(path, sharded_weights(state), state)


def _load(path: Path, wanted: dict[str, Any], state: TrainState) -> dict[str, Any]:
    """What is `wanted` of a checkpoint, its weights put into the model. Raises CheckpointError."""
    loaded = _reading(path, lambda: dist_checkpointing.load(wanted, str(path)))
    for number, chunk in enumerate(state.stored):
        chunk.load_state_dict(loaded[_chunk_key(state, number)])
    return loaded


def _reading(path: Path, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return read()
    except (Exception, CheckpointException) as error:
        # megatron and torch raise a dozen kinds here; all mean that the files are not what meta.json says.
        raise _damaged(path, f"{type(error).__name__}: {_first_line(error)}") from error


def check_model(path: Path, meta: Mapping[str, Any], state: TrainState) -> None:
    """Raise CheckpointError naming the first setting in which the checkpoint's model differs from the run's."""
    if not meta.get("weights_only", False):
        _check_optimizer(path, meta, state)
    converted = {"precision"} if meta.get("weights_only", False) else set()
    there, here = ({"mup": False} | identity for identity in (meta["model"], _identity(state)))
    for key, value in here.items():
        if key not in converted and there.get(key) != value:
            raise CheckpointError(
                f"{path}: is of another model: {key} is {there.get(key)!r} there and {value!r} in the "
                "configuration; change the configuration, or start a new run folder"
            )


def model_of_stage(model: ModelConfig, meta: Mapping[str, Any]) -> ModelConfig:
    """`model` with the rotary embedding of the stage in which a checkpoint's weights were trained; a checkpoint that
    was converted has none."""
    stage = meta.get("stage", {})
    scaling = stage.get("rope_scaling", model.rope_scaling)
    if isinstance(scaling, Mapping):
        scaling = RopeScalingConfig.model_validate(scaling)
    return model.model_copy(update={"rope_base": stage.get("rope_base", model.rope_base), "rope_scaling": scaling})


def _check_optimizer(path: Path, meta: Mapping[str, Any], state: TrainState) -> None:
    """Raise CheckpointError when the checkpoint's optimizer state is not what the run's optimizer needs."""
    saved = meta.get("optimizer", {"kind": "adamw", "groups": []})  # no such entry: of a version that had AdamW alone
    for key, value in _optimizer_identity(state).items():
        if saved[key] != value:
            raise CheckpointError(
                f"{path}: was saved with optimizer.{key}={saved[key]!r}, the configuration has {value!r}; "
                "a run keeps this setting for life"
            )


def _optimizer_identity(state: TrainState) -> dict[str, Any]:
    """What decides which state the optimizer has, and in which groups."""
    return state.config.optimizer.model_dump(mode="json", include={"kind", "groups"})


def model_identity(config: ModelConfig, vocab_size: int, precision: str) -> dict[str, Any]:
    """What makes two models the same for a checkpoint: shapes and, with muP, multipliers; not losses or initialization.

    `vocab_size` is the padded one, `precision` that of the weights.
    """
    free = {"preset", "init_std", "z_loss", "max_z_loss", "rope_base", "rope_scaling", "norm_eps", "vocab_size"}
    free |= {"moe_aux_loss"}
    if not config.mup:  # its keys then mean nothing, and older checkpoints lack them
        free |= {"mup", "mup_base_hidden_size", "mup_base_head_size"}
    if activation(config) == activation(config.model_copy(update={"activation": None})):  # likewise, the family's own
        free |= {"activation"}
    if config.num_experts is None:  # likewise
        free |= {"moe_top_k"}
    model = {key: value for key, value in config.model_dump().items() if key not in free}
    if config.hidden_size == config.num_attention_heads * head_size(config):
        model["head_size"] = None  # the same heads, said or not
    model["mtp"] = None if config.mtp is None else config.mtp.depth
    return model | {"vocab_size": vocab_size, "precision": precision}


def _identity(state: TrainState) -> dict[str, Any]:
    return model_identity(state.config.model, state.chunks[0].vocab_size, state.config.train.precision)


def sharded_state(state: TrainState, loading: bool = False) -> dict[str, Any]:
    """Weights and optimizer state as megatron's sharded state dict."""
    sharded = sharded_weights(state)
    return sharded | {"optimizer": stored_optimizer(state, sharded, _metadata(), loading)}


def sharded_weights(state: TrainState) -> dict[str, Any]:
    """The weights alone as megatron's sharded state dict; every rank calls this."""
    gather_weights(state.wrapped)
    return {
        _chunk_key(state, number): chunk.sharded_state_dict(metadata=_metadata())
        for number, chunk in enumerate(state.stored)
    }


def _metadata() -> dict[str, Any]:
    return SHARDING | {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def _chunk_key(state: TrainState, number: int) -> str:
    return "model" if len(state.chunks) == 1 else f"model{number}"


def _write(partial: Path, state: TrainState) -> None:
    try:
        dist_checkpointing.save(sharded_state(state), str(partial))
        rng = partial / "rng" / f"rank-{state.ranks.rank:05d}.pt"
        rng.parent.mkdir(exist_ok=True)  # only now: megatron wants an empty folder
        torch.save(accelerator.rng_state(), rng)
    except OSError:
        raise
    except (Exception, CheckpointException) as error:
        # A full disk reaches us from megatron's writer processes as the text of some other exception.
        raise OSError(errno.EIO, f"{type(error).__name__}: {_first_line(error)}") from error


def _finish(partial: Path, final: Path, state: TrainState, data_state: Mapping[str, Any], progress: Progress) -> None:
    save_state(partial / "data_state.npz", data_state)
    scaling = state.stage.rope_scaling
    meta = {
        "version": __version__,
        "step": progress.step,
        "tokens": progress.tokens,
        "layout": asdict(state.layout),
        "model": _identity(state),
        "optimizer": _optimizer_identity(state),
        "stage": {
            **{key: getattr(state.stage, key) for key in ("number", "seq_len", "rope_base")},
            "rope_scaling": scaling and scaling.model_dump(),
        },
        "noise_scale": state.noise_scale.state(),
        "config": state.config.model_dump(mode="json"),
    }
    publish(partial, final, meta)


def publish(partial: Path, final: Path, meta: Mapping[str, Any]) -> None:
    """Make `partial`, which has everything else, the complete checkpoint `final`: meta.json, all on disk, the name."""
    (partial / "meta.json").write_text(json.dumps(meta, indent=2))
    for path in partial.rglob("*"):
        _sync(path)
    _sync(partial)
    if final.exists():  # saved before by a run that was resumed from an earlier checkpoint
        final.rename(final.with_name(final.name + ".old.partial"))  # the next save removes it
    partial.rename(final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _reason(error: OSError, partial: Path) -> str:
    free = shutil.disk_usage(partial.parent if partial.parent.exists() else ".").free
    # torch's writer reports a full disk as a failed assertion about file positions.
    what = os.strerror(errno.ENOSPC) if free < FULL_BYTES else error.strerror or error
    return f"{what} ({error.filename or partial}; {free / 1e6:.0f} MB free there)"


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: cannot be loaded ({why.rstrip(': ')}); if its files are damaged, move the folder of this step away: "
        "the run then goes on from the checkpoint before it"
    )


def _first_line(error: BaseException) -> str:
    if isinstance(error, CheckpointException):  # its text is a traceback for every rank; the cause is enough
        error = next(iter(error.failures.values()))[0]
    return next(iter(str(error).strip().splitlines()), "")[:200]
