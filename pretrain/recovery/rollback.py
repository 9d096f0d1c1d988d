"""What a run does about an anomaly that its loss guard has found: say it, journal it, and go back if that is wanted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data_scheduler.journal import Journal
from headrace.errors import HeadraceError
from pretrain.recovery.loss_guard import Anomaly, LossGuard


class NoWayOn(HeadraceError):
    """The loss went wrong at the same step again and again."""


@dataclass(frozen=True)
class WaysBack:
    """Where a run can go back to."""

    steps: Sequence[int]
    """Of its complete checkpoints, newest first; [0] without any."""
    give_up_after: Callable[[int], None]
    """Sets those after a step aside; every rank calls it."""


def after_step(
    guard: LossGuard,
    policy: str,
    step: int,
    ways_back: Callable[[], WaysBack],
    journal: Journal,
    tell: Callable[[str], None],
) -> bool:
    """Deal with what the guard found in `step`, which is over; True: the run is to go on anew from its newest
    checkpoint, those that the guard gave up being set aside.

    Every rank calls this, with a journal of which rank 0 writes. Raises NoWayOn when the guard has no attempt left.
    """
    anomaly = guard.anomaly
    if anomaly is None:
        finding = guard.not_reproduced(step)
        if finding is not None:
            journal.append("anomaly", step, {"anomaly": step, "cause": finding.cause, "action": "none"}, "system")
            guard.note(finding)
            tell(f"step {step}: the anomaly did not come back in the same step again; {finding.cause}")
        return False
    if policy != "rollback":
        action = "update left out" if policy == "skip_step" else "warned"
        journal.append("anomaly", step, _data(anomaly) | {"action": action}, "system")
        tell(f"step {step}: {anomaly.why}; {action}")
        return False
    back = ways_back()
    decision = guard.decide(anomaly, back.steps)
    if decision is None:
        raise NoWayOn(
            f"step {step}: {anomaly.why}, still, with the updates of ever more steps before it left out; look at the "
            "batch (`headrace data trace`), lower the learning rate, or set recovery.loss_guard.policy to skip_step"
        )
    to = decision.to
    journal.append("rollback", to, decision.data(anomaly), "system")
    if to != back.steps[0]:
        back.give_up_after(to)
    if decision.passed_over is None:
        tell(f"step {step}: {anomaly.why}; back to step {to}, to see whether it comes again")
    else:
        first, last = decision.passed_over
        tell(
            f"step {step}: {anomaly.why}, again: {decision.cause}; back to step {to}, and the updates of steps {first} "
            f"to {last} are left out"
        )
    return True


def _data(anomaly: Anomaly) -> dict[str, object]:
    return {"anomaly": anomaly.step, "why": anomaly.why}
