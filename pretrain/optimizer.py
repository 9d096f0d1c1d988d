"""The optimizer: AdamW through megatron-core, plain or sharded over data-parallel ranks (ZeRO-1, arXiv 1910.02054)."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from parallel import process_groups
from parallel.engine import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    Float16Module,
    MegatronOptimizerConfig,
    clip_grad_by_total_norm_fp32,
    finalize_model_grads,
    get_megatron_optimizer,
)
from parallel.fully_sharded import FullyShardedDataParallel
from parallel.layout import Layout
from pretrain.config import OptimizerConfig
from pretrain.models.gpt import DTYPES, LanguageModel, Precision


def build_optimizer(
    config: OptimizerConfig,
    chunks: Sequence[LanguageModel],
    layout: Layout,
    precision: Precision = "fp32",
    reduce_once: bool = True,
) -> tuple[Any, list[Any]]:
    """(megatron's optimizer, the chunks wrapped for data parallelism).

    Gradients are accumulated and reduced in fp32, and under `bf16` the optimizer keeps fp32 master weights. Wrapped
    chunks share their weights with `chunks`. `reduce_once`: where these are fully sharded, gradients are summed over
    ranks on a step's last micro-batch only.
    """
    megatron = chunks[0].config
    wrapped = wrap(chunks, layout, precision)
    megatron.finalize_model_grads_func = finalize_model_grads
    # Without it every micro-batch's backward pass would start a reduction.
    if layout.overlap_grad_reduce or (layout.fully_sharded and reduce_once):
        silent = [chunk.no_sync for chunk in wrapped]
        megatron.no_sync_func = silent if len(silent) > 1 else silent[0]
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            adam_eps=config.eps,
            clip_grad=config.clip_grad,
            bf16=precision == "bf16" and not layout.fully_sharded,  # shards are the master weights
            params_dtype=DTYPES[precision],
            use_distributed_optimizer=layout.distributed_optimizer,
            overlap_param_gather=layout.overlap_param_gather,
        ),
        wrapped,
        use_gloo_process_groups=False,
    )
    if layout.fully_sharded:
        for part in optimizer.chained_optimizers:
            part.grad_stats_parallel_group = process_groups.world()  # each rank has other rows
    return optimizer, wrapped


def wrap(chunks: Sequence[LanguageModel], layout: Layout, precision: Precision) -> list[Any]:
    """`chunks`, wrapped for data parallelism."""
    megatron = chunks[0].config
    if layout.fully_sharded:
        return [FullyShardedDataParallel(megatron, chunk, DTYPES[precision]) for chunk in chunks]
    reduce_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=layout.distributed_optimizer,
        overlap_grad_reduce=layout.overlap_grad_reduce,
        overlap_param_gather=layout.overlap_param_gather,
    )
    return [
        DistributedDataParallel(
            config=megatron,
            ddp_config=reduce_config,
            module=Float16Module(megatron, chunk) if precision == "bf16" else chunk,
            disable_bucketing=number > 0,  # as megatron does: only the first chunk's gradients are finished early
        )
        for number, chunk in enumerate(chunks)
    ]


def gather_weights(wrapped: Sequence[Any]) -> None:
    """Make the weights of `wrapped` whole on every rank; all ranks call this before anything reads them between steps.

    With `overlap_param_gather` a rank otherwise has the new values of its own part only until the next forward pass.
    """
    for chunk in wrapped:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def update(
    optimizer: Any, config: OptimizerConfig, lr: float, frozen: Sequence[torch.Tensor] = ()
) -> tuple[float, bool]:
    """Clip the gradients and apply them at `lr`: (gradient norm before clipping, whether the update was skipped).
    `frozen` (see `pretrain.trainable`) count in no norm and stay as they are.

    A gradient that is infinite or not a number would destroy the weights, so it is skipped and the weights stay as they
    are; every rank sees the same norm and so decides the same.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = config.weight_decay * group["wd_mult"]  # 0 for norms and biases
    optimizer.prepare_grads()
    for parameter in frozen:
        parameter.grad = None  # such a parameter is passed over by the norm, by clipping and by Adam
    grad_norm = float(optimizer.get_grad_norm())
    if not math.isfinite(grad_norm):
        return grad_norm, True
    for part in optimizer.chained_optimizers:
        if config.clip_grad > 0.0 and (parameters := part.get_parameters()):
            clip_grad_by_total_norm_fp32(parameters, max_norm=config.clip_grad, total_norm=grad_norm)
    optimizer.step_with_ready_grads()
    return grad_norm, False
