"""The `model` section of a run's configuration, and the kernels that compute it."""

import difflib
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import ConfigDict, model_validator

from data_scheduler.config import StrictModel
from pretrain.config.numbers import NonNegativeFloat, Positive, PositiveFloat
from pretrain.config.rope import RopeScalingConfig


def _preset_or_all(schema: dict[str, Any]) -> None:
    """A section with a `preset` need not have the keys that are required of others."""
    schema["anyOf"] = [{"required": schema.pop("required")}, {"required": ["preset"]}]


class MultiTokenConfig(StrictModel):
    """Heads that predict tokens further ahead than the next one (arXiv 2404.19737); training alone uses them."""

    depth: Positive = 1
    """How many heads: the k-th predicts the token k further on than the next."""
    loss_weight: PositiveFloat = 0.3
    """Weight of the heads' mean loss in what is minimised; DeepSeek-V3 (arXiv 2412.19437) has 0.3, later 0.1."""


class ModelConfig(StrictModel):
    """The model. `family` fixes the architecture, the numbers its size; a `preset` gives both."""

    model_config = ConfigDict(json_schema_extra=_preset_or_all)

    preset: str | None = None
    """Name of a published size (docs/how-to/gpu.md lists them), which gives every key that is not given beside it."""
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
    head_size: Positive | None = None
    """Width of one head; hidden_size / num_attention_heads when not given. Qwen3 has 128 whatever the others are."""
    ffn_hidden_size: Positive
    """Inner width of the MLP."""
    activation: Literal["silu", "gelu", "gelu_tanh"] | None = None
    """What the MLP applies to its gate, in `wonton` to its inner numbers: SiLU (SwiGLU), the exact GELU (GeGLU in
    `llama` and `qwen3`) or GELU's tanh approximation, as Gemma has it; the family's own (silu, in wonton gelu) when not
    given."""
    vocab_size: Positive | None = None
    """Rows of the embedding; the tokenizer's size rounded up to a multiple of 128 when not given."""
    rope_base: PositiveFloat = 10000.0
    """Base of the rotary embedding's frequencies."""
    rope_scaling: RopeScalingConfig | None = None
    """Stretches these frequencies, for a model that was trained with shorter sequences."""
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
    mtp: MultiTokenConfig | None = None
    """Multi-token prediction: heads of one transformer block each beside the main one; null: none."""

    @model_validator(mode="before")
    @classmethod
    def _preset_fills_in(cls, raw: Any) -> Any:
        if not isinstance(raw, Mapping) or not isinstance(name := raw.get("preset"), str):
            return raw
        from pretrain.models.presets import PRESETS  # which are made of this class

        if name not in PRESETS:
            near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(PRESETS)}"
            raise ValueError(f"no preset {name!r} ({hint})")
        return PRESETS[name].model_dump(exclude_unset=True) | dict(raw)

    @model_validator(mode="after")
    def _activation_fits(self) -> Self:
        if self.activation == "silu" and self.family == "wonton":
            raise ValueError("activation silu: the wonton family has no gates; take gelu or gelu_tanh")
        return self

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
        if self.mup:
            raise ValueError("num_experts: there is no muP rule for experts and their router; set mup to false")
        if self.mtp is not None:
            raise ValueError("num_experts: multi-token heads have a dense MLP; leave mtp out")
        return self


class KernelsConfig(StrictModel):
    """Who computes an operator: torch, or the fused kernel of `csrc/`. `auto` takes the fused one where it is built and
    was measured to be faster. The two differ by rounding."""

    swiglu: Literal["auto", "torch", "fused"] = "auto"
    """Activation of the MLP in `llama` and `qwen3`; `fused` is refused where it is not built."""
    qk_norm_rope: Literal["auto", "torch", "fused"] = "auto"
    """Norm (where the model has one) and rotary embedding of queries and keys, out of the fused QKV projection; `fused`
    is refused where it is not built, and for fp16."""
    head: Literal["auto", "torch", "fused"] = "auto"
    """Output layer and loss; `fused` never has the logits of more than a part of a micro-batch's tokens in memory. It
    is refused where it is not built, and for fp16."""
    geglu: Literal["auto", "torch", "fused"] = "auto"
    """As `swiglu`, where `model.activation` is `gelu` or `gelu_tanh`."""
    bias_gelu: Literal["auto", "torch", "fused"] = "auto"
    """Bias and activation of the MLP in `wonton`."""
    embedding: Literal["auto", "torch", "fused"] = "auto"
    """Gradient of the input embedding: `fused` sorts the tokens, sums those that are equal, and adds to the rows that
    occur only."""
    adamw: Literal["auto", "torch", "fused"] = "auto"
    """AdamW's update, with clipping and the copy to 16-bit weights in the same pass; `fused` is refused where it is not
    built, and for `optimizer.kind: sgd`. A run may change it on resume."""
    grad_norm: Literal["auto", "torch", "fused"] = "auto"
    """The norm of all gradients; `fused` is refused where it is not built."""
    residual_norm: Literal["auto", "torch", "fused"] = "auto"
    """Norms of blocks with the residual additions before them, and the last norm; `fused` is refused where it is not
    built, and with fp16. Between blocks addition and norm are one pass unless `train.recompute: full` or
    `parallel.fully_sharded` keep the blocks apart."""
