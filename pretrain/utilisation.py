"""How much of its devices' arithmetic a step used: model FLOPs utilisation, MFU (arXiv 2204.02311, appendix B).

    use = Utilisation(config, vocab_size, world_size=8)
    use.of_step(seq_len=4096, tokens=4096 * 64, took_s=1.7)     # {"model_flops_per_s": 2.1e15, "mfu": 0.41, ...}

Operations are those the model needs, whatever is computed twice to save memory. `mfu` counts attention in full, as most
published figures do, `mfu_causal` its causal half; with packed documents the model computes still less than that.
"""

import re

from parallel import accelerator
from pretrain.config import RunConfig
from pretrain.models.sizes import flops_per_token

PEAK_FLOPS = (
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("GH200", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A40", 149.7e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
)
"""FLOP/s in dense bf16 by words of a device's name, of the makers' data sheets; the first that fits counts."""


class Utilisation:
    """Of one run's model on its devices."""

    def __init__(self, config: RunConfig, vocab_size: int, world_size: int, device: str | None = None) -> None:
        """`vocab_size`: the padded one; `device`: the name of one device (default: this process's)."""
        self._model, self._vocab_size, self._world_size = config.model, vocab_size, world_size
        self._peak = config.metrics.peak_flops or peak_flops(
            accelerator.describe()["device"] if device is None else device
        )

    def of_step(self, seq_len: int, tokens: int, took_s: float) -> dict[str, float]:
        """What a step's record has of it: FLOP/s of one device, and shares of its peak where that is known.

        `tokens`: those the model was given, in sequences of `seq_len`; `took_s`: seconds, waiting for data included.
        """
        full, causal = flops_per_token(self._model, self._vocab_size, seq_len)
        speed = tokens / took_s / self._world_size
        if self._peak is None:
            return {"model_flops_per_s": full * speed}
        return {
            "model_flops_per_s": full * speed,
            "mfu": full * speed / self._peak,
            "mfu_causal": causal * speed / self._peak,
        }


def peak_flops(device: str) -> float | None:
    """FLOP/s of a device by its name; None for one that is not in the table, and for CPUs."""
    if device.startswith("cpu"):
        return None
    return next((peak for name, peak in PEAK_FLOPS if re.search(rf"\b{name}\b", device)), None)
