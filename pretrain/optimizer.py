"""The optimizer: AdamW, SGD or Muon through megatron-core, plain or sharded over data-parallel ranks (ZeRO-1, arXiv
1910.02054)."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from headrace.errors import ConfigError
from parallel import accelerator, process_groups
from parallel.adam import GroupStepAdam
from parallel.engine import (
    MegatronOptimizerConfig,
    clip_grad_by_total_norm_fp32,
    finalize_model_grads,
    get_megatron_optimizer,
    get_parameter_groups,
    parallel_state,
)
from parallel.fused_adamw import use_fused_adamw
from parallel.fused_matrices import FUSIONS, AttentionShape, fusion_of
from parallel.gradient_norm import gradient_norm
from parallel.kernels import adamw, choice, grad_norm
from parallel.layout import Layout
from parallel.muon import Muon
from parallel.parameter_names import is_block_matrix, parameter_names
from parallel.whole_parameter_optimizer import Part, WholeParameterOptimizer
from pretrain.config import RunConfig
from pretrain.config.training import OptimizerConfig
from pretrain.data_parallel import wrap
from pretrain.dynamics import Measurement
from pretrain.models.gpt import DTYPES, LanguageModel
from pretrain.parameter_groups import overrides

Groups = list[dict[str, Any]]


def build_optimizer(config: RunConfig, chunks: Sequence[LanguageModel], layout: Layout) -> tuple[Any, list[Any]]:
    """(megatron's optimizer, the chunks wrapped for data parallelism).

    Gradients are accumulated and reduced in fp32, and under `bf16` and `fp16` the optimizer keeps fp32 master weights.
    Wrapped chunks share their weights with `chunks`. Raises ConfigError for parameter groups that do not fit the model.
    """
    megatron, precision, kind = chunks[0].config, config.train.precision, config.optimizer.kind
    # Owners of whole parameters need whole gradients.
    sharded = layout.distributed_optimizer and kind == "adamw"
    wrapped = wrap(chunks, layout, precision, sharded)
    megatron.finalize_model_grads_func = finalize_model_grads
    # Without it every micro-batch's backward pass would start a reduction.
    if layout.overlap_grad_reduce or (layout.fully_sharded and layout.reduce_gradients == "step"):
        silent = [chunk.no_sync for chunk in wrapped]
        megatron.no_sync_func = silent if len(silent) > 1 else silent[0]
    names = parameter_names(wrapped if layout.fully_sharded else chunks)
    special = overrides(config.optimizer, config.model, names)
    settings = _megatron_config(config, layout, sharded)
    if kind == "adamw":
        optimizer = get_megatron_optimizer(settings, wrapped, special, use_gloo_process_groups=False)
    else:
        groups = get_parameter_groups(wrapped, settings, special)
        parts = _sgd(config.optimizer, groups) if kind == "sgd" else _muon(config, groups, names, megatron)
        optimizer = WholeParameterOptimizer(parts, settings, names, layout.distributed_optimizer)
    if layout.fully_sharded:
        for part in optimizer.chained_optimizers:
            part.grad_stats_parallel_group = process_groups.world()  # each rank has other rows
    _use_kernels(optimizer, config)
    if precision == "fp16":
        megatron.grad_scale_func = optimizer.scale_loss
    return optimizer, wrapped


def _use_kernels(optimizer: Any, config: RunConfig) -> None:
    """What `kernels.adamw` and `kernels.grad_norm` say. Raises ConfigError for `fused` where it cannot be."""
    device, wanted = accelerator.device().type, config.kernels
    if choice.choose(grad_norm.KERNEL, wanted.grad_norm, device)[0] == "fused":
        optimizer.get_grad_norm = partial(gradient_norm, optimizer)
    updated = 0
    if choice.choose(adamw.KERNEL, wanted.adamw, device)[0] == "fused":
        updated = use_fused_adamw(optimizer)
    if wanted.adamw == "fused" and not updated:
        why = f"optimizer.kind is {config.optimizer.kind}"
        if config.optimizer.kind != "sgd":
            why = "TransformerEngine's or apex's Adam is in use"
        raise ConfigError(f"kernels.adamw: fused, but {why}; leave the key out")


def _megatron_config(config: RunConfig, layout: Layout, sharded: bool) -> Any:
    own, train = config.optimizer, config.train
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=own.lr,
        min_lr=own.min_lr,
        weight_decay=own.weight_decay,
        adam_beta1=own.beta1,
        adam_beta2=own.beta2,
        adam_eps=own.eps,
        clip_grad=own.clip_grad,
        bf16=train.precision == "bf16" and not layout.fully_sharded,  # shards are the master weights
        fp16=train.precision == "fp16",
        params_dtype=DTYPES[train.precision],
        use_distributed_optimizer=sharded,
        overlap_param_gather=layout.overlap_param_gather,
        initial_loss_scale=train.initial_loss_scale,
        min_loss_scale=min(1.0, train.initial_loss_scale),
        loss_scale_window=train.loss_scale_window,
        hysteresis=1,  # megatron's 2 would keep the scale at the first overflow, and at no later one
    )


def _sgd(config: OptimizerConfig, groups: Groups) -> list[Part]:
    momentum = config.momentum
    inner = torch.optim.SGD(groups, lr=config.lr, momentum=momentum, nesterov=config.nesterov and momentum > 0.0)
    return [Part(inner, ("momentum_buffer",) if momentum else ())]


def _muon(config: RunConfig, groups: Groups, names: Mapping[torch.nn.Parameter, str], megatron: Any) -> list[Part]:
    """Muon for the blocks' matrices, AdamW for everything else."""
    own = config.optimizer
    matrices: Groups = []
    for group in groups:
        for fusion in FUSIONS:
            params = [
                p
                for p in group["params"]
                if is_block_matrix(names[p], p) and fusion_of(names[p], megatron.gated_linear_unit) == fusion
            ]
            matrices.append({**group, "params": params, "fusion": fusion})
    rest = [{**group, "params": [p for p in group["params"] if not is_block_matrix(names[p], p)]} for group in groups]
    shape = AttentionShape(megatron.num_attention_heads // megatron.num_query_groups, megatron.kv_channels)
    muon = Muon(
        matrices,
        lr=own.lr,
        momentum=own.momentum,
        nesterov=own.nesterov,
        weight_decay=own.weight_decay,
        attention=shape,
        tensor_parallel=parallel_state.get_tensor_model_parallel_group(),
        # bf16 is enough for the iteration (Keller Jordan 2024) and twice as fast where weights are bf16 too.
        dtype=DTYPES[config.train.precision],
    )
    adam = GroupStepAdam(rest, lr=own.lr, betas=(own.beta1, own.beta2), eps=own.eps, weight_decay=own.weight_decay)
    return [Part(muon, ("momentum_buffer",)), Part(adam, ("exp_avg", "exp_avg_sq"))]


def update(
    optimizer: Any,
    config: OptimizerConfig,
    lr: float,
    frozen: Sequence[torch.Tensor] = (),
    measurement: Measurement | None = None,
    allows: Callable[[float], bool] | None = None,
) -> tuple[float, bool]:
    """Clip the gradients and apply them at `lr`: (gradient norm before clipping, whether the update was skipped).
    `frozen` (see `pretrain.trainable`) count in no norm and stay as they are.

    A gradient that is infinite or not a number would destroy the weights, so it is skipped and the weights stay as they
    are; every rank sees the same norm and so decides the same. With fp16 the loss scale has then been halved. `allows`
    is asked with the norm and may refuse as well.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]
        group["weight_decay"] = config.weight_decay * group["wd_mult"]  # 0 for norms and biases
    optimizer.prepare_grads()
    for parameter in frozen:
        parameter.grad = None  # such a parameter is passed over by the norm, by clipping and by the update
    if measurement is not None:
        measurement.before_update()
    own = torch.as_tensor(optimizer.get_grad_norm(), dtype=torch.float64, device=accelerator.device()).view(1)
    # Replicas compute it each for itself, and must decide alike also when one computes wrongly.
    norm = process_groups.largest_over_all(torch.nan_to_num(own, nan=math.inf, posinf=math.inf))
    total = float(norm) if math.isfinite(float(own)) else float(own)
    allowed = allows is None or allows(total)
    if not allowed or not math.isfinite(total):
        if measurement is not None:
            measurement.after_no_update()
        return total, True
    if config.clip_grad > 0.0:
        _clip(optimizer, norm, total, config.clip_grad)
    optimizer.step_with_ready_grads()
    if measurement is not None:
        measurement.after_update()
    return total, False


def _clip(optimizer: Any, norm: torch.Tensor, total: float, limit: float) -> None:
    """Scale the gradients, whose norm is `total`, down to `limit`: now, or in the update by our kernel."""
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, GroupStepAdam) and part.optimizer.fused:
            part.optimizer.clip(norm, limit)
            continue
        parameters = [parameter for parameter in part.get_parameters() if parameter.grad is not None]
        if parameters:
            clip_grad_by_total_norm_fp32(parameters, max_norm=limit, total_norm=total)


def loss_scale(optimizer: Any) -> float:
    """What the loss is multiplied with before the backward pass; 1 without fp16."""
    return float(optimizer.get_loss_scale())


def restore(optimizer: Any, saved: Any) -> None:
    """Put a checkpoint's optimizer state into `optimizer`; all but state and step counts is the configuration's."""
    if not isinstance(optimizer, WholeParameterOptimizer):
        parts = optimizer.chained_optimizers
        states = [saved] if len(parts) == 1 else [saved[number] for number in range(len(parts))]
        for part, state in zip(parts, states, strict=True):
            groups = state.get("optimizer", state)["param_groups"]
            for group, own in zip(groups, part.param_groups, strict=True):
                group.update({key: value for key, value in own.items() if key not in ("params", "step")})
    optimizer.load_state_dict(saved)
