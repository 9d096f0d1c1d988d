"""Which rank holds the others up: how long each computes before it meets the others, compared.

    stragglers = Stragglers(config.recovery, ranks, state.chunks[0].config)
    stragglers.begin(step)                # before every step
    ...                                   # forward and backward
    record |= stragglers.after(step, tell)

A slow machine shows nowhere in the times of whole steps, since all ranks wait for it and so all take as long. So each
rank takes the time from the beginning of a step to where gradients are summed over replicas: its own. Every
`recovery.stragglers_every` steps the ranks gather the median of their last SAMPLES times, and each is compared with the
ranks that do the same work: those of its pipeline stage. Ranks that hold parts of one model replica wait for each other
inside a step, so one that is slow makes its whole replica show. Where every rank waits for every other at each layer
(`parallel.fully_sharded`) nobody shows, and nothing is gathered.

On a GPU the device is waited for in the steps that are measured, SAMPLES in every `stragglers_every`.
"""

import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from parallel import accelerator, process_groups
from parallel.process_groups import Ranks
from pretrain.config.recovery import RecoveryConfig

SAMPLES = 5
"""Steps of which a rank's time is the median: one slow step (a collection, a page fault) is nobody's fault."""
FLOOR_S = 0.01
"""Nobody is held up by less, whatever the ratio."""


@dataclass(frozen=True)
class RankTime:
    """What a rank tells the others."""

    rank: int
    host: str
    stage: int
    """Its pipeline stage."""
    seconds: float


@dataclass(frozen=True)
class Straggler:
    """A rank beside the median of those that do the same work."""

    time: RankTime
    usual_s: float
    of: int
    """Ranks that do the same work."""

    @property
    def ratio(self) -> float:
        """1 for one that is like the others."""
        return self.time.seconds / max(self.usual_s, 1e-9)


def slowest_first(times: Sequence[RankTime]) -> list[Straggler]:
    """Every rank beside the others of its stage, the worst ratio first; ranks that are alone in theirs are left out."""
    found = []
    for stage in {each.stage for each in times}:
        alike = [each for each in times if each.stage == stage]
        if len(alike) > 1:
            usual = statistics.median_low([each.seconds for each in alike])  # of two the faster one
            found += [Straggler(each, usual, len(alike)) for each in alike]
    return sorted(found, key=lambda each: (-each.ratio, each.time.rank))


class Stragglers:
    """One rank's part in it."""

    def __init__(self, config: RecoveryConfig, ranks: Ranks, megatron: Any, comparable: bool = True) -> None:
        """`megatron`: the model's TransformerConfig, which has what is called when gradients are to be summed;
        `comparable`: ranks have times of their own."""
        every = config.stragglers_every if comparable and ranks.world_size > 1 else 0
        self._every, self._factor, self._ranks = every, config.straggler_factor, ranks
        self._host = socket.gethostname()
        self._began = 0.0
        self._measured = False
        self._times: list[float] = []
        self._known: set[int] = set()
        if self._every:
            self._watch(megatron)

    def begin(self, step: int) -> None:
        """`step` begins to compute."""
        self._measured = bool(self._every) and step % self._every >= self._every - SAMPLES
        if self._measured:
            accelerator.synchronize()
            self._began = time.perf_counter()

    def after(self, step: int, tell: Callable[[str], None]) -> dict[str, float]:
        """What the record of `step` has about it; every rank calls this."""
        if not self._measured or (step + 1) % self._every or not self._times:
            return {}
        own = RankTime(self._ranks.rank, self._host, self._ranks.pp_rank, statistics.median(self._times))
        self._times.clear()
        order = slowest_first(process_groups.gather_objects(own))
        if not order:
            return {}
        slow = [each for each in order if each.ratio > self._factor and each.time.seconds - each.usual_s > FLOOR_S]
        for each in slow:
            if each.time.rank not in self._known:
                tell(
                    f"step {step}: rank {each.time.rank} on {each.time.host} is a straggler: it computes for "
                    f"{each.time.seconds:.3g} s before it meets the others, {each.ratio:.1f} times the median of the "
                    f"{each.of} ranks that do the same work"
                )
        now = {each.time.rank for each in slow}
        for rank in sorted(self._known - now):
            tell(f"step {step}: rank {rank} is no straggler any more")
        self._known = now
        return {"slowest_rank": order[0].time.rank, "slowest_rank_ratio": order[0].ratio}

    def _watch(self, megatron: Any) -> None:
        sum_gradients = megatron.finalize_model_grads_func

        def met(*args: Any, **kwargs: Any) -> Any:
            if self._measured:
                accelerator.synchronize()
                self._times.append(time.perf_counter() - self._began)
            return sum_gradients(*args, **kwargs)

        megatron.finalize_model_grads_func = met
