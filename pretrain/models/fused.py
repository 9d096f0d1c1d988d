"""Which operators of a model the fused kernels compute: what `kernels:` asks for, and what model and device allow."""

from typing import Literal

import torch

from headrace.errors import ConfigError
from parallel import accelerator, process_groups
from parallel.kernels import bias_gelu, embedding, geglu, qk_norm_rope, residual_norm, swiglu
from parallel.kernels.choice import Choice, Kernel, choose
from parallel.kernels.choice import kernels as known_kernels
from pretrain.config import KernelsConfig, ModelConfig
from pretrain.models.sizes import FAMILIES, activation

DTYPES = (torch.float32, torch.bfloat16)
MlpKernel = Literal["swiglu", "geglu", "bias_gelu"]
MLP_KERNELS: dict[MlpKernel, tuple[Kernel, str]] = {
    "swiglu": (swiglu.KERNEL, "SwiGLU"),
    "geglu": (geglu.KERNEL, "GeGLU"),
    "bias_gelu": (bias_gelu.KERNEL, "bias before a GELU"),
}


def mlp_kernel(config: ModelConfig) -> MlpKernel:
    """The kernel that can compute the activation of the model's MLPs."""
    if not FAMILIES[config.family].gated:
        return "bias_gelu"
    return "swiglu" if activation(config) == "silu" else "geglu"


def activation_is_fused(config: ModelConfig, kernels: KernelsConfig, dtype: torch.dtype) -> bool:
    """Whether a fused kernel computes the activation. Raises ConfigError for kernels that cannot be had."""
    own = mlp_kernel(config)
    for name, (_, what) in MLP_KERNELS.items():
        if name != own and getattr(kernels, name) == "fused":
            raise ConfigError(f"kernels.{name}: fused, but {_described(config)} has no {what}; leave the key out")
    return _is_fused(MLP_KERNELS[own][0], getattr(kernels, own), dtype)


def embedding_is_fused(kernels: KernelsConfig, dtype: torch.dtype) -> bool:
    """Whether the embedding's gradient is. Raises ConfigError for a kernel that cannot be had."""
    return _is_fused(embedding.KERNEL, kernels.embedding, dtype)


def norms_are_fused(kernels: KernelsConfig, dtype: torch.dtype) -> bool:
    """Whether norms with the residual additions before them are. Raises ConfigError for a kernel that cannot be had."""
    return _is_fused(residual_norm.KERNEL, kernels.residual_norm, dtype)


def qk_norm_rope_is_fused(kernels: KernelsConfig, dtype: torch.dtype) -> bool:
    """Whether norm and rotary embedding of queries and keys are. Raises ConfigError for a kernel that cannot be had."""
    return _is_fused(qk_norm_rope.KERNEL, kernels.qk_norm_rope, dtype)


def check_same_everywhere(kernels: KernelsConfig) -> None:
    """Raise ConfigError when processes would compute with other kernels than their peers, as where a node's library is
    missing or older: their collectives would not meet. Every process calls this."""
    device = accelerator.device().type
    own = {name: choose(kernel, getattr(kernels, name), device)[0] for name, kernel in known_kernels().items()}
    everyone = process_groups.gather_objects(own)
    differ = [name for name in own if len({each[name] for each in everyone}) > 1]
    if differ:
        raise ConfigError(f"kernels.{differ[0]}: built on some nodes only; build it on all, or set it to torch")


def _described(config: ModelConfig) -> str:
    return config.family if config.activation is None else f"{config.family} with activation {config.activation}"


def _is_fused(kernel: Kernel, asked: Choice, dtype: torch.dtype) -> bool:
    if dtype not in DTYPES:
        if asked == "fused":
            raise ConfigError(f"kernels.{kernel.name}: fused does not take fp16; leave the key out")
        return False
    return choose(kernel, asked, accelerator.device().type)[0] == "fused"
