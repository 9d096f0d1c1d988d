"""The learning rate of every step: a pure function, so that resuming needs no scheduler state."""

import math

from pretrain.config import OptimizerConfig


def learning_rate(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """Learning rate of update `step`, counted from 0, in a run of `total_steps`.

    Warm-up rises linearly and reaches the peak with update number `warmup_steps` (counted from 1). Then `cosine`
    (arXiv 1608.03983, without restarts) and `linear` fall to min_lr at update number `decay_steps`, `wsd` (MiniCPM,
    arXiv 2404.06395) holds the peak and falls linearly over the last `decay_steps` updates, `constant` holds.
    """
    number = step + 1
    if number < config.warmup_steps:
        return config.lr * number / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "wsd":
        length = max(1, total_steps // 10) if config.decay_steps is None else config.decay_steps
        start, end = max(config.warmup_steps, total_steps - length), total_steps
    else:
        start, end = config.warmup_steps, total_steps if config.decay_steps is None else config.decay_steps
    if number <= start:
        return config.lr
    if number >= end:
        return config.min_lr
    done = (number - start) / (end - start)
    share = (1.0 + math.cos(math.pi * done)) / 2.0 if config.schedule == "cosine" else 1.0 - done
    return config.min_lr + (config.lr - config.min_lr) * share
