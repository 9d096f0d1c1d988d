"""The `model` section of a run's configuration, and the kernels that compute it."""

from typing import Literal, Self

from pydantic import model_validator

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
    z_loss: NonNegativeFloat = 0.0
    """Coefficient of z-loss, c·log²Z (PaLM, arXiv 2204.02311)."""
    max_z_loss: NonNegativeFloat = 0.0
    """Coefficient of max-z loss, c·(max logit)² (Baichuan 2, arXiv 2309.10305)."""
    num_experts: Positive | None = None
    """Experts in place of every block's MLP (mixture of experts, arXiv 2101.03961); null: a dense MLP."""
    moe_top_k: Positive = 2
    """Experts that each token goes through, weighted by the softmax over their router scores."""
    moe_ffn_hidden_size: Positive | None = None
    """Inner width of each expert; `ffn_hidden_size` when not given."""
    moe_shared_ffn_hidden_size: Positive | None = None
    """Inner width of one more expert that every token goes through (arXiv 2401.06066); null: none."""
    moe_aux_loss: NonNegativeFloat = 0.01
    """Coefficient of the load-balancing loss of every layer and micro-batch (arXiv 2101.03961, equation 4); it is
    minimised and is no part of the reported loss."""

    @model_validator(mode="after")
    def _experts_fit(self) -> Self:
        if self.num_experts is None:
            if self.moe_ffn_hidden_size or self.moe_shared_ffn_hidden_size:
                raise ValueError("moe_ffn_hidden_size and moe_shared_ffn_hidden_size need num_experts")
            return self
        if self.moe_top_k > self.num_experts:
            raise ValueError(f"moe_top_k {self.moe_top_k} is more than num_experts {self.num_experts}")
        if self.family == "wonton":
            raise ValueError("num_experts: the wonton family has biases, which experts do not; take llama or qwen3")
        return self


class KernelsConfig(StrictModel):
    """Who computes an operator: torch, or the fused kernel of `csrc/`. `auto` takes the fused one where it is built and
    was measured to be faster. The two differ by rounding."""

    swiglu: Literal["auto", "torch", "fused"] = "auto"
    """Activation of the MLP in `llama` and `qwen3`; `fused` is refused where it is not built."""
