"""The `model` section of a run's configuration, and the kernels that compute it."""

import difflib
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ConfigDict, model_validator

from data_scheduler.config import StrictModel
from pretrain.config.numbers import NonNegativeFloat, Positive, PositiveFloat


def _preset_or_all(schema: dict[str, Any]) -> None:
    """A section with a `preset` need not have the keys that are required of others."""
    schema["anyOf"] = [{"required": schema.pop("required")}, {"required": ["preset"]}]


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


class KernelsConfig(StrictModel):
    """Who computes an operator: torch, or the fused kernel of `csrc/`. `auto` takes the fused one where it is built and
    was measured to be faster. The two differ by rounding."""

    swiglu: Literal["auto", "torch", "fused"] = "auto"
    """Activation of the MLP in `llama` and `qwen3`; `fused` is refused where it is not built."""
