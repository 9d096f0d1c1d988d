"""The optimizer: AdamW through megatron-core, plain or sharded over data-parallel ranks (ZeRO-1, arXiv 1910.02054)."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from parallel.engine import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    Float16Module,
    MegatronOptimizerConfig,
    clip_grad_by_total_norm_fp32,
    finalize_model_grads,
    get_megatron_optimizer,
)
from parallel.layout import Layout
from pretrain.config import OptimizerConfig
from pretrain.models.gpt import DTYPES, LanguageModel, Precision


def build_optimizer(
    config: OptimizerConfig, chunks: Sequence[LanguageModel], layout: Layout, precision: Precision = "fp32"
) -> tuple[Any, list[Any]]:
    """(megatron's optimizer, the chunks wrapped for data parallelism).

    Gradients are accumulated and reduced in fp32, and under `bf16` the optimizer keeps fp32 master weights. Wrapped
    chunks share their weights with `chunks`.
    """
    megatron = chunks[0].config
    reduce_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=layout.distributed_optimizer
    )
    wrapped = [
        DistributedDataParallel(
            config=megatron,
            ddp_config=reduce_config,
            module=Float16Module(megatron, chunk) if precision == "bf16" else chunk,
            disable_bucketing=number > 0,  # as megatron does: only the first chunk's gradients are finished early
        )
        for number, chunk in enumerate(chunks)
    ]
    megatron.finalize_model_grads_func = finalize_model_grads
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
            bf16=precision == "bf16",
            params_dtype=DTYPES[precision],
            use_distributed_optimizer=layout.distributed_optimizer,
        ),
        wrapped,
        use_gloo_process_groups=False,
    )
    return optimizer, wrapped


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
        parameters = [parameter for parameter in part.get_parameters() if parameter.grad is not None]
        if config.clip_grad > 0.0 and parameters:
            clip_grad_by_total_norm_fp32(parameters, max_norm=config.clip_grad, total_norm=grad_norm)
    optimizer.step_with_ready_grads()
    return grad_norm, False
