"""The wonton for transformers: LayerNorm, biases, an ungated MLP, LayerNorm on queries and keys (arXiv 2404.15702).

This file is copied into exported model folders. Attention, caches, masks and generation are those of transformers'
Qwen3, which normalises queries and keys head by head too; norms and MLP are exchanged.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3DecoderLayer,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3RotaryEmbedding,
)

from .configuration_wonton import WontonConfig


class WontonAttention(Qwen3Attention):
    """Attention whose queries and keys are normalised by LayerNorm, or not at all."""

    def __init__(self, config: WontonConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        for name in ("q_norm", "k_norm"):
            norm = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps) if config.qk_norm else nn.Identity()
            setattr(self, name, norm)


class WontonMLP(nn.Module):
    """down(act(up(x))), both with biases."""

    def __init__(self, config: WontonConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x[..., hidden_size]` to the same shape."""
        return self.down_proj(self.act_fn(self.up_proj(x)))


class WontonDecoderLayer(Qwen3DecoderLayer):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: WontonConfig, layer_idx: int) -> None:
        super(Qwen3DecoderLayer, self).__init__()
        self.hidden_size = config.hidden_size
        self.self_attn = WontonAttention(config, layer_idx)
        self.mlp = WontonMLP(config)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


NO_SPLIT = ["WontonDecoderLayer"]
RECORDED = {"hidden_states": WontonDecoderLayer, "attentions": WontonAttention}


class WontonModel(Qwen3Model):
    """The blocks and the last norm; gives hidden states."""

    config_class = WontonConfig
    _no_split_modules = NO_SPLIT
    _can_record_outputs = RECORDED

    def __init__(self, config: WontonConfig) -> None:
        super(Qwen3Model, self).__init__(config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([WontonDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.has_sliding_layers = False
        self.post_init()


class WontonForCausalLM(Qwen3ForCausalLM):
    """The model with its output head; gives logits."""

    config_class = WontonConfig
    _no_split_modules = NO_SPLIT
    _can_record_outputs = RECORDED

    def __init__(self, config: WontonConfig) -> None:
        super(Qwen3ForCausalLM, self).__init__(config)
        self.model = WontonModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
