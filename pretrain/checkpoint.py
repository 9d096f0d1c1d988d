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

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

from data_scheduler.state import Snapshots, load_state
from headrace.errors import CheckpointError
from headrace.version import __version__
from parallel import accelerator, exchange
from parallel.engine import dist_checkpointing, parallel_state
from parallel.layout import Layout
from parallel.whole_parameter_optimizer import WholeParameterOptimizer
from pretrain.checkpoint_saving import Saving, first_line
from pretrain.complete_checkpoints import complete_steps
from pretrain.config import CheckpointConfig, ModelConfig
from pretrain.config.rope import RopeScalingConfig
from pretrain.data_parallel import gather_weights
from pretrain.models.sizes import activation, head_size
from pretrain.optimizer_state import fp32_weights_name, load_from_other_form
from pretrain.recovery.fault_points import reach
from pretrain.recovery.retention import doomed, size_of
from pretrain.step import TrainState
from pretrain.stored_optimizer import restore_optimizer, stored_optimizer

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

    def begin(self, state: TrainState, data_state: Mapping[str, Any], progress: Progress, *, behind: bool) -> Saving:
        """Begin a checkpoint on all ranks together; with `behind` its files are written while training goes on.

        `data_state` holds all lanes. Raises CheckpointError on every rank when any cannot write.
        """
        final = self.path(progress.step)
        try:
            partial = exchange.from_first_rank(lambda: self._prepare(final), state.ranks.rank)
        except OSError as error:
            raise CheckpointError(
                f"checkpoint of step {progress.step} not written: {error.strerror} ({error.filename})"
            ) from None
        meta = _meta(state, progress)
        rank = state.ranks.rank
        return Saving(partial, final, lambda: sharded_state(state), data_state, meta, rank, behind=behind)

    def end(self, saving: Saving, config: CheckpointConfig | None = None, needed: Set[int] = frozenset()) -> Path:
        """Finish a checkpoint on all ranks together, and remove those that by `config` need not stay, besides those of
        the steps that are `needed`; its path.

        It exists from the moment its folder is renamed. Raises CheckpointError on every rank when any could not write;
        checkpoints that were complete stay.
        """
        path = saving.finish()
        exchange.only_first_rank(lambda: self._retire(config, saving, needed), saving.rank)
        reach("checkpoint: older removed")
        return path

    def save(
        self,
        state: TrainState,
        data_state: Mapping[str, Any],
        progress: Progress,
        config: CheckpointConfig | None = None,
    ) -> Path:
        """Write a checkpoint now: `begin` and `end`."""
        return self.end(self.begin(state, data_state, progress, behind=False), config)

    def _prepare(self, final: Path) -> Path:
        for leftover in self.folder.glob("*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)  # a writer that still lives may hold a file
        # A name of its own: should a writer of a run that was killed still live, it finds its folder gone.
        partial = final.with_name(f"{final.name}.{os.getpid()}-{time.time_ns():x}.partial")
        partial.mkdir(parents=True)
        return partial

    def _retire(self, config: CheckpointConfig | None, saving: Saving, needed: Set[int]) -> None:
        Snapshots(self.run_dir).save(saving.data_state)
        if config is None:
            return
        steps = self.steps()
        sizes = {step: size_of(self.path(step)) for step in steps} if config.max_total_gb else {}
        for step in doomed(steps, config.keep_last, config.keep_every, config.max_total_gb, sizes):
            # An older one may bear a higher number when a run was resumed before it.
            if step != saving.step and step not in needed:
                self._remove(step)

    def _remove(self, step: int) -> None:
        """Take the checkpoint's name first: none that is half removed must look whole. What cannot be removed stays."""
        going = self.path(step).with_name(f"{self.path(step).name}.old.partial")
        with contextlib.suppress(OSError):
            self.path(step).rename(going)
            shutil.rmtree(going, ignore_errors=True)


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
    if state.guard is not None and "loss_guard" in meta:
        state.guard.load(meta["loss_guard"])
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
        raise _damaged(path, f"{type(error).__name__}: {first_line(error)}") from error


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
    own = state.config.optimizer
    if own.kind == "sgd" and own.momentum and meta["config"]["optimizer"]["momentum"] == 0.0:
        raise CheckpointError(
            f"{path}: was saved with optimizer.momentum=0, so it lacks the sum of gradients to go on from with "
            f"{own.momentum:g}; set it to 0, or start a new run folder"
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


def _meta(state: TrainState, progress: Progress) -> dict[str, Any]:
    scaling = state.stage.rope_scaling
    return {
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
        **({} if state.guard is None else {"loss_guard": state.guard.state()}),
        "config": state.config.model_dump(mode="json"),
    }


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


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: cannot be loaded ({why.rstrip(': ')}); if its files are damaged, move the folder of this step away: "
        "the run then goes on from the checkpoint before it"
    )
