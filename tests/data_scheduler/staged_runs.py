"""A run of 14 steps whose sequences, batch and mixture change over its stages; four sources, a to d."""

from collections.abc import Callable
from typing import Any

import numpy as np

from data_scheduler import DataConfig, Scheduler

Make = Callable[..., DataConfig]
STEPS = 14
LANES = 12
CURRICULUM: list[dict[str, Any]] = [
    {"from_step": 4, "seq_len": 128, "weights": {"a": 1.0, "d": 3.0}},
    {"from_step": 8, "batch_ramp": {"to": 24, "multiply": 2, "every": 2}},
    {"from_step": 12, "weights": {"c": 1.0}},
]


def staged(data_config: Make, **changes: Any) -> DataConfig:
    given = {"seq_len": 32, "global_batch_size": 6, "lanes": LANES, "stages": CURRICULUM, "prefetch": 2}
    return data_config(**given | changes)


def counts(scheduler: Scheduler, steps: int) -> list[list[int]]:
    return [np.bincount(next(scheduler).source_ids, minlength=4).tolist() for _ in range(steps)]
