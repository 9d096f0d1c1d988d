"""What `metrics.jsonl` says of a step; `pretrain.metrics.registry` tells what each value means."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pretrain.loss import FIXED_POINT
from pretrain.metrics import Record
from pretrain.selection.selection import selection_record
from pretrain.stages import StageSettings
from pretrain.step import StepResult


class Circumstances(NamedTuple):
    """What is known of a step besides its result; the same on every rank."""

    step: int
    stage: StageSettings
    lr: float
    tokens: int
    """Target tokens trained on, those of this step included."""
    input_tokens: int
    """Tokens given, likewise."""
    took_s: float
    data_wait_s: float
    """Of the rank that waited longest."""
    passes_s: float
    """Of the rank whose forward and backward passes took longest; `update_s` likewise."""
    update_s: float
    peak_memory_bytes: int
    """Of the fullest rank."""
    batch_sha256: str
    is_fp16: bool


def by_source(result: StepResult, names: Sequence[str]) -> tuple[dict[str, float], dict[str, int]]:
    """(mean loss, tokens) of each source that had tokens in the step; `names` are those of all sources."""
    tokens = {name: int(count) for name, count in zip(names, result.source_tokens, strict=True) if count}
    sums = dict(zip(names, result.source_loss_sums.tolist(), strict=True))
    return {name: sums[name] / FIXED_POINT / count for name, count in tokens.items()}, tokens


def step_record(
    result: StepResult, at: Circumstances, losses: Mapping[str, float], tokens: Mapping[str, int], names: Sequence[str]
) -> Record:
    """The record of a training step; `losses` and `tokens` by source, see `by_source`."""
    record: Record = {
        "step": at.step,
        "tokens": at.tokens,
        "input_tokens": at.input_tokens,
        "seq_len": at.stage.seq_len,
        "global_batch_size": at.stage.global_batch_size,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "not_finite": int(not (math.isfinite(result.loss) and math.isfinite(result.grad_norm))),
        "lr": at.lr,
        "tokens_per_s": sum(tokens.values()) / at.took_s,
        "step_s": at.took_s,
        "data_wait_s": at.data_wait_s,
        "passes_s": at.passes_s,
        "update_s": at.update_s,
        "peak_memory_bytes": at.peak_memory_bytes,
        "batch_sha256": at.batch_sha256,
        "source_loss": dict(losses),
        "source_tokens": dict(tokens),
    }
    if at.is_fp16:
        record["loss_scale"] = result.loss_scale
    if result.mtp_loss is not None:
        record["mtp_loss"] = result.mtp_loss
    if result.selected is not None:
        record |= selection_record(result.selected, names)
    if result.dynamics is not None:
        record |= result.dynamics
    return record
