"""The configured scaling of the rotary embedding, as attention takes it."""

from parallel.rope_scaling import RopeScaling
from pretrain.config.rope import RopeScalingConfig


def rope_scaling(config: RopeScalingConfig | None) -> RopeScaling | None:
    """`config` with the defaults of its kind; None: the plain rotary embedding."""
    if config is None:
        return None
    return RopeScaling(**{key: value for key, value in config.model_dump().items() if value is not None})
