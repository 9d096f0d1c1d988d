"""What is looked at after every step: the loss guard's finding, and at times whether replicas hold the same weights."""

from collections.abc import Callable

from data_scheduler.journal import Journal
from pretrain.config.recovery import RecoveryConfig
from pretrain.data_parallel import gather_weights
from pretrain.recovery.loss_guard import LossGuard
from pretrain.recovery.replicas import check_replicas
from pretrain.recovery.rollback import WaysBack, after_step
from pretrain.step import TrainState


def new_guard(config: RecoveryConfig, journal: Journal, precision: str) -> LossGuard | None:
    """The guard of a run, which knows what the journal says of earlier anomalies; None when it is off."""
    if config.loss_guard.policy == "off":
        return None
    return LossGuard(config.loss_guard, [*journal.of("rollback"), *journal.of("anomaly")], precision)


def check_health(
    config: RecoveryConfig,
    state: TrainState,
    step: int,
    ways_back: Callable[[], WaysBack],
    journal: Journal,
    tell: Callable[[str], None],
) -> bool:
    """Look at what `step` left behind; True: the run is to go on anew from its newest checkpoint.

    Every rank calls this.
    Raises NoWayOn (`rollback.py`), ReplicasDiffer (`replicas.py`).
    """
    goes_back = False
    if state.guard is not None:
        goes_back = after_step(state.guard, config.loss_guard.policy, step, ways_back, journal, tell)
    due = config.replicas_every and (step + 1) % config.replicas_every == 0
    if due and not state.layout.fully_sharded:  # where no rank holds what another does
        gather_weights(state.wrapped)  # with overlap_param_gather they are on their way
        # Experts are spread over data-parallel ranks; megatron marks them so.
        weights = [p for chunk in state.chunks for p in chunk.parameters() if getattr(p, "allreduce", True)]
        check_replicas(weights, step, state.ranks.rank)
    return goes_back
