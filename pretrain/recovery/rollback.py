"""What a run does about an anomaly that its loss guard has found: say it, journal it, and go back if that is wanted."""

from collections.abc import Callable

from data_scheduler.journal import Journal
from headrace.errors import HeadraceError
from pretrain.recovery.loss_guard import Anomaly, LossGuard


class NoWayOn(HeadraceError):
    """The loss went wrong at the same step again and again."""


def after_step(
    guard: LossGuard, policy: str, step: int, newest: Callable[[], int], journal: Journal, tell: Callable[[str], None]
) -> bool:
    """Deal with what the guard found in `step`, which is over; True: the run is to go back to its newest checkpoint.

    Every rank calls this, with a journal of which rank 0 writes. `newest`: the step of that checkpoint, 0 without one.
    Raises NoWayOn when the guard has no attempt left.
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
    to = newest()
    decision = guard.decide(anomaly, to)
    if decision is None:
        raise NoWayOn(
            f"step {step}: {anomaly.why}, still, with the updates of ever more steps before it left out; look at the "
            "batch (`headrace data trace`), lower the learning rate, or set recovery.loss_guard.policy to skip_step"
        )
    journal.append("rollback", to, decision.data(anomaly), "system")
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
