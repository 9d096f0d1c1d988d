"""Configuration of a wonton model for transformers. This file is copied into exported model folders."""

from transformers import Qwen3Config


class WontonConfig(Qwen3Config):
    """Qwen3's keys, whose rotary embedding and attention a wonton has, and two of its own."""

    model_type = "wonton"
    attention_bias: bool = True
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    """Epsilon of every norm; `rms_norm_eps` is not used."""
    qk_norm: bool = True
    """LayerNorm on the queries and keys of every head."""
