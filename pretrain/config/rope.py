"""Scaling of the rotary embedding: `model.rope_scaling`, and a stage's."""

from typing import Annotated, Final, Literal

from pydantic import Field, model_validator

from data_scheduler.config import StrictModel
from pretrain.config.numbers import Positive, PositiveFloat

OPTIONS: Final[dict[str, tuple[str, ...]]] = {
    "linear": (),
    "ntk": (),
    "yarn": ("original_seq_len", "beta_fast", "beta_slow", "attention_factor"),
    "llama3": ("original_seq_len", "low_freq_factor", "high_freq_factor"),
}
"""What each kind takes besides `factor`."""


class RopeScalingConfig(StrictModel):
    """Stretches the rotary embedding of a model that was trained with shorter sequences."""

    kind: Literal["linear", "ntk", "yarn", "llama3"]
    """`linear`: position interpolation (arXiv 2306.15595). `ntk`: a larger base. `yarn`: by the wavelength of each pair
    of dimensions, and sharper attention (arXiv 2309.00071). `llama3`: that of Llama 3.1."""
    factor: Annotated[float, Field(ge=1.0, allow_inf_nan=False)]
    """How many times longer the sequences may be than those before."""
    original_seq_len: Positive | None = None
    """`yarn`, `llama3`: length of the sequences that the model was trained with before."""
    beta_fast: PositiveFloat | None = None
    """`yarn`: pairs that turn more often than this in that length stay as they are; 32 when not given."""
    beta_slow: PositiveFloat | None = None
    """`yarn`: pairs that turn less often are interpolated; 1 when not given."""
    attention_factor: PositiveFloat | None = None
    """`yarn`: factor of queries and keys; 0.1 · ln(factor) + 1 when not given."""
    low_freq_factor: PositiveFloat | None = None
    """`llama3`: as `beta_slow`; 1 when not given."""
    high_freq_factor: PositiveFloat | None = None
    """`llama3`: as `beta_fast`; 4 when not given."""

    @model_validator(mode="after")
    def _has_what_its_kind_takes(self) -> "RopeScalingConfig":
        takes = OPTIONS[self.kind]
        for key in RopeScalingConfig.model_fields:
            if key not in ("kind", "factor", *takes) and getattr(self, key) is not None:
                raise ValueError(f"{key} is not an option of kind {self.kind}; leave it out")
        if "original_seq_len" in takes and self.original_seq_len is None:
            raise ValueError(f"kind {self.kind} needs original_seq_len, the length that the model was trained with")
        for low, high in (
            ("beta_slow", (self.beta_slow or 1.0, self.beta_fast or 32.0)),
            ("low_freq_factor", (self.low_freq_factor or 1.0, self.high_freq_factor or 4.0)),
        ):
            if high[0] >= high[1]:
                above = {"beta_slow": "beta_fast", "low_freq_factor": "high_freq_factor"}[low]
                raise ValueError(f"{low} {high[0]:g} must be below {above} {high[1]:g}")
        return self
