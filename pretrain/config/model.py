"""The `model` section of a run's configuration, and the kernels that compute it."""

from typing import Literal

from data_scheduler.config import StrictModel
from pretrain.config.numbers import NonNegativeFloat, Positive, PositiveFloat


class ModelConfig(StrictModel):
    """The model. `family` fixes the architecture, the numbers its size."""

    family: Literal["wonton", "llama", "qwen3"]
    """`wonton`: LayerNorm, biases, GELU, QK-LayerNorm (Nyonic, arXiv 2404.15702). `llama`: RMSNorm, SwiGLU, GQA, no
    biases. `qwen3`: llama with QK-RMSNorm."""
    num_layers: Positive
    """Transformer blocks."""
    hidden_size: Positive
    """Width of the residual stream."""
    num_attention_heads: Positive
    """Query heads."""
    num_query_groups: Positive | None = None
    """Key/value heads (GQA); as many as query heads when not given."""
    ffn_hidden_size: Positive
    """Inner width of the MLP."""
    vocab_size: Positive | None = None
    """Rows of the embedding; the tokenizer's size rounded up to a multiple of 128 when not given."""
    rope_base: PositiveFloat = 10000.0
    """Base of the rotary embedding's frequencies."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of every norm."""
    qk_norm: bool | None = None
    """Norm on queries and keys; the family's default (wonton and qwen3: yes, llama: no) when not given."""
    tie_embeddings: bool = False
    """Share the input embedding with the output head."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of weights at the start; output projections of attention and MLP get init_std/√(2·layers)."""
    mup: bool = False
    """Scale start, learning rates, attention and logits by width so that the best learning rate of a narrow model is
    that of a wide one too (muP, arXiv 2203.03466, table 8); see docs/how-to/optimizers.md."""
    mup_base_hidden_size: Positive = 256
    """With `mup`: width at which it changes nothing; that of the model the learning rate was found with, or any."""
    mup_base_head_size: Positive = 64
    """With `mup`: head size at which attention has its usual scale; it falls as 1/head_size."""
    z_loss: NonNegativeFloat = 0.0
    """Coefficient of z-loss, c·log²Z (PaLM, arXiv 2204.02311)."""
    max_z_loss: NonNegativeFloat = 0.0
    """Coefficient of max-z loss, c·(max logit)² (Baichuan 2, arXiv 2309.10305)."""


class KernelsConfig(StrictModel):
    """Who computes an operator: torch, or the fused kernel of `csrc/`. `auto` takes the fused one where it is built and
    was measured to be faster. The two differ by rounding."""

    swiglu: Literal["auto", "torch", "fused"] = "auto"
    """Activation of the MLP in `llama` and `qwen3`; `fused` is refused where it is not built."""
