"""A loss that is not finite, or jumps: warn, skip the step's update, or go back to before it.

    guard = LossGuard(config.recovery.loss_guard, journal.of("rollback"), precision="bf16")
    guard.begin(step)                       # before every step
    guard.allows(loss, grad_norm)           # before its update: False leaves the weights alone
    guard.anomaly                           # what was wrong with the step; None: nothing

A step is anomalous when its loss is not finite, or when its loss or the logarithm of its gradient norm lies more than
`threshold` robust standard deviations above the median of the last 16 steps. The deviation is taken from differences of
neighbours among the last `window` steps, into which the trend of a falling loss does not enter: 1.4826 / sqrt(2) of
their median absolute value (Hampel 1974). Only upward: a loss that falls fast is no harm.
All ranks see the same two numbers and so decide the same. Losses of before a checkpoint are in it, so a resumed run
decides as the uninterrupted one.

What happens then, `policy`:

`warn`       it is said and journaled, the update is made.
`skip_step`  the update is left out: the weights stay what they were. Data, learning rate and step count go on.
`rollback`   the update is left out, and the run goes back to its newest checkpoint and does the same steps again.
             If the anomaly does not come back, it was no property of data and weights: hardware, most likely. If it
             does, the run goes back once more, and the updates of the anomalous step and of the `quarantine - 1` steps
             before it are left out this time (PaLM, arXiv 2204.02311, section 5.1, went back and skipped 200 to 500
             batches). Both findings are journaled. `lr_factor` slows the `lr_steps` steps after the window. When no
             attempt from the newest checkpoint helps, its weights may be what is wrong: it is set aside, and the run
             goes back to the one before it, once to each.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from data_scheduler.journal import Event
from pretrain.config.recovery import LossGuardConfig

NORMAL = 1.4826 / math.sqrt(2.0)
"""Standard deviations of independent normal numbers in the median absolute difference of two."""
RECENT = 16
"""Steps whose median is what the step at hand should be like."""
FLOOR = 0.005
"""No spread is taken for less than this (nats; and of the logarithm of the norm): a loss that hardly moves has jumps of
that size by chance."""

Cause = Literal["unknown", "data or optimisation", "not reproduced: hardware, most likely"]


@dataclass(frozen=True)
class Anomaly:
    """What was wrong with a step."""

    step: int
    why: str
    """For people, e.g. `loss 9.13 is 21 standard deviations above the median 2.87`."""
    loss: float
    grad_norm: float


@dataclass(frozen=True)
class Rollback:
    """What has been decided, or found out, about an anomaly."""

    anomaly: int
    """Step of the anomaly."""
    attempt: int
    """1: the same again; from 2 on: with a window left out."""
    passed_over: tuple[int, int] | None
    """First and last step whose update is left out from now on."""
    cause: Cause
    to: int
    """Step that the run goes back to; -1: it goes on."""

    def data(self, anomaly: Anomaly) -> dict[str, Any]:
        """As the journal has it."""
        return {
            "anomaly": self.anomaly,
            "to": self.to,
            "attempt": self.attempt,
            "passed_over": None if self.passed_over is None else list(self.passed_over),
            "cause": self.cause,
            "why": anomaly.why,
            # JSON has no NaN
            "loss": anomaly.loss if math.isfinite(anomaly.loss) else None,
            "grad_norm": anomaly.grad_norm if math.isfinite(anomaly.grad_norm) else None,
        }


class LossGuard:
    """Judges every step of a run, the same on every rank."""

    def __init__(self, config: LossGuardConfig, events: Iterable[Event], precision: str) -> None:
        """`events`: the journal's of kinds `rollback` and `anomaly`."""
        self._config, self._scales_loss = config, precision == "fp16"
        self._losses: deque[float] = deque(maxlen=config.window)
        self._log_norms: deque[float] = deque(maxlen=config.window)
        self._rollbacks = [_rollback(event) for event in events if "cause" in event.data]
        self._step = 0
        self.anomaly: Anomaly | None = None
        """What was wrong with the step at hand."""

    def state(self) -> dict[str, list[float]]:
        """What a checkpoint keeps."""
        return {"losses": list(self._losses), "log_norms": list(self._log_norms)}

    def load(self, state: dict[str, list[float]]) -> None:
        """Take over a checkpoint's state."""
        self._losses.clear()
        self._losses.extend(state["losses"])
        self._log_norms.clear()
        self._log_norms.extend(state["log_norms"])

    def begin(self, step: int) -> None:
        """`step` is at hand."""
        self._step, self.anomaly = step, None

    def allows(self, loss: float, grad_norm: float) -> bool:
        """Judge the step at hand; False: its update is to be left out."""
        if self._is_passed_over(self._step):
            return False
        why = self._wrong(loss, grad_norm)
        if why:
            self.anomaly = Anomaly(self._step, why, loss, grad_norm)
        if math.isfinite(loss) and math.isfinite(grad_norm):
            # Anomalous ones too: a level that stays is the new level after half a window.
            self._losses.append(loss)
            self._log_norms.append(math.log(max(grad_norm, 1e-30)))
        return not why or self._config.policy == "warn"

    def lr_scale(self, step: int) -> float:
        """Factor of the learning rate of `step`."""
        config = self._config
        windows = [each.passed_over for each in self._rollbacks if each.passed_over is not None]
        near = any(last < step <= last + config.lr_steps for _, last in windows)
        return config.lr_factor if near else 1.0

    def decide(self, anomaly: Anomaly, checkpoints: Sequence[int]) -> Rollback | None:
        """What to do about an anomaly under the policy `rollback`; `checkpoints`: steps of the complete ones, newest
        first, [0] without any. None when nothing more can be done."""
        decision = self._from_newest(anomaly.step, checkpoints[0])
        for newer, to in pairwise(checkpoints):
            decision = decision or self._from_older(anomaly.step, to, newer)
        return decision

    def _from_newest(self, step: int, to: int) -> Rollback | None:
        most = self._config.max_attempts
        tried = [each for each in self._rollbacks if each.anomaly == step and each.to >= 0]
        # Two steps' worth of attempts without a new checkpoint: the trouble moves on with the run.
        if len(tried) > most or sum(each.to == to for each in self._rollbacks) >= 2 * (most + 1):
            return None
        if not tried:
            return Rollback(step, 1, None, "unknown", to)
        # Every further attempt leaves out one window more before the step.
        first = max(to, step - self._config.quarantine * len(tried) + 1)  # what was before `to` is in the weights
        if tried[-1].passed_over == (first, step):
            return None  # the same again would be no other
        return Rollback(step, len(tried) + 1, (first, step), "data or optimisation", to)

    def _from_older(self, step: int, to: int, newer: int) -> Rollback | None:
        """Once from every older checkpoint: what is wrong may be in the weights of the `newer` one, so the updates that
        led to it are left out as well."""
        if any(
            each.to == to and each.passed_over is not None and each.passed_over[1] >= newer for each in self._rollbacks
        ):
            return None
        attempt = 1 + sum(each.anomaly == step and each.to >= 0 for each in self._rollbacks)
        window = (max(to, newer - self._config.quarantine), step)
        return Rollback(step, attempt, window, "data or optimisation", to)

    def not_reproduced(self, step: int) -> Rollback | None:
        """The finding, once `step` has gone well the second time: its anomaly was not of data and weights."""
        tried = [each for each in self._rollbacks if each.anomaly == step]
        if self.anomaly is None and len(tried) == 1 and tried[0].passed_over is None:
            return Rollback(step, 1, None, "not reproduced: hardware, most likely", -1)
        return None

    def note(self, rollback: Rollback) -> None:
        """Remember what has been journaled."""
        self._rollbacks.append(rollback)

    def _is_passed_over(self, step: int) -> bool:
        return any(
            each.passed_over is not None and each.passed_over[0] <= step <= each.passed_over[1]
            for each in self._rollbacks
        )

    def _wrong(self, loss: float, grad_norm: float) -> str:
        if not math.isfinite(loss):
            return f"loss is {loss}"
        if not math.isfinite(grad_norm):
            return "" if self._scales_loss else f"gradient norm is {grad_norm}"  # fp16 looks for its scale that way
        return self._jump("loss", loss, loss, self._losses) or self._jump(
            "gradient norm", grad_norm, math.log(max(grad_norm, 1e-30)), self._log_norms
        )

    def _jump(self, name: str, shown: float, value: float, history: Sequence[float]) -> str:
        if len(history) < self._config.min_steps:
            return ""
        recent = list(history)
        middle = statistics.median(recent[-RECENT:])
        spread = NORMAL * statistics.median(abs(b - a) for a, b in pairwise(recent))
        score = (value - middle) / max(spread, FLOOR)
        if score <= self._config.threshold:
            return ""
        return f"{name} {shown:.4g} is {score:.0f} robust standard deviations above that of the {RECENT} steps before"


def _rollback(event: Event) -> Rollback:
    data = event.data
    window = data.get("passed_over")
    passed_over = None if window is None else (window[0], window[1])
    return Rollback(data["anomaly"], data.get("attempt", 1), passed_over, data["cause"], data.get("to", -1))
