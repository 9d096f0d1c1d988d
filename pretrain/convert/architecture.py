"""A `ModelConfig` as a Hugging Face `config.json`, and back. Plain data; needs no transformers.

`config.json` is written in the form that transformers 4 and 5 and the inference engines all read (`rope_theta` and
`torch_dtype` at the top level); both that form and that of transformers 5 (`rope_parameters`, `dtype`) are read.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch

from data_scheduler.encoder import Encoder
from headrace.errors import ConfigError
from headrace.validation import validated
from pretrain.config import ModelConfig
from pretrain.convert.rope import rope_from_hf, rope_to_hf
from pretrain.models.sizes import Activation, activation, has_qk_norm, head_size, query_groups

Family = Literal["llama", "qwen3", "wonton"]
ARCHITECTURES: dict[Family, str] = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "wonton": "WontonForCausalLM",
}
AUTO_MAP = {
    "AutoConfig": "configuration_wonton.WontonConfig",
    "AutoModel": "modeling_wonton.WontonModel",
    "AutoModelForCausalLM": "modeling_wonton.WontonForCausalLM",
}
"""Where transformers finds what it does not have: files in the model folder, copied from `wonton/`."""
# What transformers assumes where config.json is silent.
DEFAULTS: dict[Family, dict[str, Any]] = {
    "llama": {"num_key_value_heads": None, "head_dim": None},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "wonton": {"num_key_value_heads": None, "head_dim": None, "hidden_act": "gelu"},
}
HIDDEN_ACT: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
WHOLE_NUMBERS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
"""Sizes that config.json has to give, or that have a default."""
COMMON_DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "layer_norm_eps": 1e-5,
    "qk_norm": True,
    "initializer_range": 0.02,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


def hf_family(model: ModelConfig) -> Family:
    """The Hugging Face model that computes what `model` does. Raises ConfigError when there is none."""
    if model.num_experts is not None:
        raise ConfigError("model.num_experts: models with experts cannot be converted; dense ones can be")
    if model.mup:
        raise ConfigError("model.mup: the Hugging Face format has no place for its attention and logit factors")
    if model.family == "wonton":
        return "wonton"
    return "qwen3" if has_qk_norm(model) else "llama"


def to_hf_config(
    model: ModelConfig, vocab_size: int, seq_len: int, dtype: torch.dtype, encoder: Encoder
) -> dict[str, Any]:
    """`config.json`. Raises ConfigError when transformers has no such model."""
    family = hf_family(model)
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": query_groups(model),
        "head_dim": head_size(model),
        "hidden_act": next(name for name, ours in HIDDEN_ACT.items() if ours == activation(model)),
        "max_position_embeddings": seq_len,
        "initializer_range": model.init_std,
        "layer_norm_eps" if family == "wonton" else "rms_norm_eps": model.norm_eps,
        **rope_to_hf(model),
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": family == "wonton",
        "attention_dropout": 0.0,
        "bos_token_id": encoder.bos_id,  # null where there is none; without it transformers assumes 1 for a llama
        "eos_token_id": encoder.eos_id,
        "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if family == "llama":
        config["mlp_bias"] = False
    else:
        config |= {"use_sliding_window": False, "sliding_window": None}
    if family == "wonton":
        config |= {"qk_norm": has_qk_norm(model), "auto_map": AUTO_MAP}
    return config


def from_hf_config(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The model of a `config.json`. Raises ConfigError, naming `where` and the key, for what cannot be represented."""
    family = _family(config, where)
    config = {**COMMON_DEFAULTS, **DEFAULTS[family], **config}
    for key in WHOLE_NUMBERS:
        value = config.get(key)
        if type(value) is not int or value < 1:
            raise ConfigError(f"{where}: {key} must be a whole number above 0, got {value!r}")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = hidden // heads if config["head_dim"] is None else config["head_dim"]
    groups = heads if config["num_key_value_heads"] is None else config["num_key_value_heads"]
    act = config["hidden_act"]
    for key, unsupported in (
        ("attention_bias", bool(config.get("attention_bias")) != (family == "wonton")),
        ("mlp_bias", bool(config.get("mlp_bias"))),
        ("hidden_act", not isinstance(act, str) or act not in HIDDEN_ACT),
        ("use_sliding_window", bool(config.get("use_sliding_window"))),
        ("quantization_config", config.get("quantization_config") is not None),
        ("hidden_size", config["head_dim"] is None and hidden % heads != 0),
        ("head_dim", type(head_dim) is not int or head_dim < 2 or head_dim % 2 != 0),
        ("num_key_value_heads", type(groups) is not int or groups < 1 or heads % groups != 0),
    ):
        if unsupported:
            raise ConfigError(f"{where}: {key} = {config.get(key)!r} is not supported")
    own_act = "gelu" if family == "wonton" else "silu"
    model = {
        "family": family,
        "num_layers": config["num_hidden_layers"],
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "head_size": None if head_dim * heads == hidden else head_dim,
        "ffn_hidden_size": config["intermediate_size"],
        "activation": None if HIDDEN_ACT[act] == own_act else HIDDEN_ACT[act],
        "vocab_size": config["vocab_size"],
        **rope_from_hf(config, where),
        "norm_eps": config["layer_norm_eps" if family == "wonton" else "rms_norm_eps"],
        "qk_norm": False if family == "wonton" and not config["qk_norm"] else None,
        "tie_embeddings": config["tie_word_embeddings"],
        "init_std": config["initializer_range"],
    }
    return validated(ModelConfig, model, where)


def _family(config: Mapping[str, Any], where: str) -> Family:
    kind, architectures = config.get("model_type"), config.get("architectures")
    if architectures is not None and not isinstance(architectures, list):
        raise ConfigError(f"{where}: architectures must be a list of names, got {architectures!r}")
    for family, architecture in ARCHITECTURES.items():
        if kind == family and (not architectures or architecture in architectures):
            return family
    *others, last = ARCHITECTURES.values()
    found = ", ".join(map(str, architectures)) if architectures else f"model_type {kind!r}"
    raise ConfigError(f"{where}: {found} cannot be converted; {', '.join(others)} and {last} can")
