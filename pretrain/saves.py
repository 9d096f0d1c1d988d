"""A run's saves, one at a time: begun between two steps, written behind the next ones, finished between two others."""

from collections.abc import Callable
from typing import Any

from data_scheduler import Scheduler, merge_states
from data_scheduler.state import LANE_ARRAYS
from parallel import exchange
from parallel.process_groups import Ranks
from pretrain.checkpoint import Checkpoints, Progress
from pretrain.checkpoint_saving import Saving
from pretrain.config import CheckpointConfig
from pretrain.recovery.copies import Copies
from pretrain.recovery.fault_points import reach
from pretrain.recovery.manifest import set_aside
from pretrain.recovery.rollback import WaysBack
from pretrain.recovery.second_place import SecondPlace
from pretrain.step import TrainState


class Saves:
    """Every rank has one, and calls each method at the same time."""

    def __init__(
        self, checkpoints: Checkpoints, config: CheckpointConfig, ranks: Ranks, tell: Callable[[str], None]
    ) -> None:
        """`tell`: hears of what people should know."""
        self._checkpoints, self._config, self._ranks, self._tell = checkpoints, config, ranks, tell
        self._saving: Saving | None = None
        self.copies = Copies(config, checkpoints.run_dir, ranks.rank, tell)
        self.saved_at = -1
        """Step of the newest checkpoint that was begun or loaded."""

    @property
    def is_writing(self) -> bool:
        """Whether this rank's files are being written; when none's are, `finish` does not wait."""
        return self._saving is not None and self._saving.is_writing

    def save(self, state: TrainState, scheduler: Scheduler, done: Progress, *, behind: bool = False) -> None:
        """Save what is `done`; with `behind` the files are written while training goes on."""
        if done.step in (0, self.saved_at):
            return  # an optimizer that has made no step has no state to go on from; or a person asked for it just now
        self.finish(scheduler)
        self.saved_at = done.step
        self._saving = self._checkpoints.begin(state, self._data_state(scheduler), done, behind=behind)
        if not behind:
            self.finish(scheduler)

    def finish(self, scheduler: Scheduler) -> None:
        """Wait for the checkpoint that is being written, if there is one, and journal it."""
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        path = self._checkpoints.end(saving, self._config, self.copies.unfinished)
        event = {"path": str(path.relative_to(self._checkpoints.run_dir)), "tokens": saving.tokens}
        scheduler.journal.append("checkpoint", saving.step, event, "system")
        reach("checkpoint: journaled")
        self._tell(f"checkpoint at step {saving.step}: {path}")
        self.copies.send(path)

    def abandon(self) -> None:
        """The run ends by an error: end the writing on this rank. Its folder stays without its name."""
        if self._saving is not None:
            self._saving.abandon()
        self.copies.close()

    def ways_back(self, scheduler: Scheduler, second: SecondPlace | None) -> WaysBack:
        """The checkpoints that the loss guard may go back to, that which is being written included."""
        self.finish(scheduler)
        steps = exchange.from_first_rank(self._checkpoints.steps, self._ranks.rank)
        return WaysBack(steps[::-1] or [0], lambda to: self._give_up_after(to, second))

    def _give_up_after(self, to: int, second: SecondPlace | None) -> None:
        """Set the checkpoints of steps after `to` aside, here and in the second place, so that it is the newest."""
        self.copies.close()

        def give_up() -> None:
            for step in self._checkpoints.steps():
                if step > to:
                    set_aside(self._checkpoints.path(step), "given-up")
            if second is not None:
                for step in second.steps():
                    if step > to:
                        second.remove(step)

        exchange.only_first_rank(give_up, self._ranks.rank)

    def _data_state(self, scheduler: Scheduler) -> dict[str, Any]:
        """The scheduler's state with every rank's lanes."""
        own = scheduler.state_dict()
        gathered = zip(*(exchange.gather_arrays(own[key]) for key in LANE_ARRAYS), strict=True)
        return merge_states(
            [
                {**own, **dict(zip(LANE_ARRAYS, arrays, strict=True)), "lanes_mod": [rank, self._ranks.dp_size]}
                for rank, arrays in enumerate(gathered)
            ]
        )
