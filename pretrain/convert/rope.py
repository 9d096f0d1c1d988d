"""The rotary embedding in a Hugging Face `config.json`: `rope_theta` and `rope_scaling`, and back."""

from collections.abc import Mapping
from typing import Any, Final

from pydantic import ValidationError

from headrace.errors import ConfigError
from parallel.rope_scaling import scaled_base
from pretrain.config import ModelConfig
from pretrain.config.rope import RopeScalingConfig
from pretrain.models.sizes import head_size

NAMES: Final[dict[str, str]] = {
    "factor": "factor",
    "original_seq_len": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
}
"""Our key and theirs."""
KINDS: Final = ("linear", "yarn", "llama3")
"""That both have, under the same name."""
LLAMA3_DEFAULTS: Final = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""transformers wants them written."""


def rope_to_hf(model: ModelConfig) -> dict[str, Any]:
    """`rope_theta`, and `rope_scaling` where there is one; `ntk` is a plain embedding of another base."""
    scaling = model.rope_scaling
    if scaling is None:
        return {"rope_theta": model.rope_base}
    if scaling.kind == "ntk":
        return {"rope_theta": scaled_base(model.rope_base, head_size(model), scaling.factor)}
    ours = (LLAMA3_DEFAULTS if scaling.kind == "llama3" else {}) | scaling.model_dump(exclude_none=True)
    theirs = {NAMES[key]: value for key, value in ours.items() if key != "kind"}
    return {"rope_theta": model.rope_base, "rope_scaling": {"rope_type": scaling.kind} | theirs}


def rope_from_hf(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`rope_base` and `rope_scaling` of a model. Raises ConfigError for partial embeddings and unknown scalings."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}  # the order of transformers 5
    if not isinstance(rope, Mapping):
        key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
        raise ConfigError(f"{where}: {key} must be a section with a rope_type, got {rope!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise ConfigError(
            f"{where}: partial_rotary_factor {partial!r} is not supported; only whole rotary embeddings are"
        )
    base = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    if kind == "default":
        return {"rope_base": base}
    if kind not in KINDS:
        raise ConfigError(f"{where}: rope scaling {kind!r} is not supported; {', '.join(KINDS)} are")
    ours = {theirs: own for own, theirs in NAMES.items()}
    given = {key: value for key, value in rope.items() if value is not None}
    given = {key: value for key, value in given.items() if key not in ("rope_type", "type", "rope_theta")}
    given.pop("partial_rotary_factor", None)
    if kind == "linear":  # transformers 5 writes it for every kind, and does not use it here
        given.pop("original_max_position_embeddings", None)
    unknown = sorted(set(given) - set(ours))
    if unknown:
        raise ConfigError(f"{where}: rope scaling {kind!r} with {unknown[0]} is not supported")
    try:
        scaling = RopeScalingConfig.model_validate({"kind": kind, **{ours[key]: given[key] for key in given}})
    except ValidationError as error:
        problem = error.errors()[0]
        name = NAMES.get(str(problem["loc"][0]), "") if problem["loc"] else ""
        said = problem["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{where}: rope scaling {kind!r}: {name + ': ' if name else ''}{said}") from None
    return {"rope_base": base, "rope_scaling": scaling}
