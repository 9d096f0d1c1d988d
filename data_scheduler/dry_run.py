"""A run's decisions without its data: what each step draws from which source, by the parts that a run uses.

    policy ──► shares (less those of sources that are through) ──► mixer ──► counts ──► slots ──► lanes

A lane that is through with a source (it gave `max_epochs` epochs) takes sequences of others in its place, and `horizon`
steps after the last lane was, the source's share goes to the others, as in `Scheduler`. When a lane is through depends
on how many sequences it holds; that is given, for it cannot be known without reading. All else is exact.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from data_scheduler.assumed_losses import AssumedLosses, FlatLosses
from data_scheduler.bands import bands_of
from data_scheduler.config import DataConfig, check_horizon
from data_scheduler.journal import Journal
from data_scheduler.mixture import ONE, Mixer, quantize, slots
from data_scheduler.order import GOLDEN, Int64, lanes_of
from data_scheduler.plan import Chosen, Plan
from data_scheduler.policies import Feedback, Policy
from data_scheduler.policies.context import Context, SourceSize
from data_scheduler.policies.guard import open_policy
from data_scheduler.stages import configured_events, policy_of, tokens_before, weights_of

UNLIMITED = 1 << 62


class Draw(NamedTuple):
    """What one step draws. Shares are in units of 1/ONE."""

    step: int
    asked: Int64
    """int64[sources]: the policy's shares."""
    shares: Int64
    """int64[sources]: the same, with those of sources that are through given to the others."""
    counts: Int64
    """int64[sources]: sequences, summing to the global batch."""
    owed: Int64
    """int64[sources]: Σ shares·B less what the mixer drew, in units of 1/ONE sequences."""
    seq_len: int
    """Tokens that the model sees of each sequence."""


class DryRun:
    """Iterates over the steps of a run that has just begun, as `Draw`s; ends early only where the run would."""

    def __init__(
        self,
        config: DataConfig,
        capacities: Mapping[str, Int64] | None = None,
        losses: AssumedLosses | None = None,
        sizes: Mapping[str, SourceSize] | None = None,
        run_steps: int | None = None,
    ) -> None:
        """capacities: of sources with `max_epochs`, the tokens that each lane can give, int64[lanes]; a source
        without is never through. losses: what a policy that listens is told, as training and held-out losses alike;
        flat when None. sizes: of the sources; all alike when None. run_steps: the length of the run.

        Raises ConfigError for a policy, options or weights that cannot be used.
        """
        self.config = config
        self.names = [source.name for source in config.sources]
        self.journal = Journal()
        self.plan = Plan(self.journal)
        alike = SourceSize(1, 1.0)
        self._context = Context(
            names=tuple(self.names),
            run_steps=run_steps,
            horizon=config.policy.horizon,
            seed=config.seed,
            bands=bands_of(config),
            held_out=frozenset(source.name for source in config.sources if source.val_paths),
            size_of=lambda name: alike if sizes is None else sizes[name],
            tokens_before=lambda step: tokens_before(self.plan.shape, step),
        )
        self._record("run_started", 0, {"data": config.model_dump(mode="json")})
        for kind, step, data in list(configured_events(config, run_steps, self.plan, 0)):
            self._record(kind, step, data)
        self._turns = {event.step for event in self.journal.events}
        """Steps with which stages begin or grow; 0 is one."""
        self._chosen, self._policy = self._open_policy(self.plan.chosen(0))
        self.listens = self._policy.uses_feedback
        """Whether the policy looks at losses, or that of a stage."""
        for number, stage in enumerate(config.stages):
            if stage.policy is not None:
                kind, options = policy_of(config, number).values()
                policy = open_policy(config, self._context, kind, options, weights_of(config, number))
                self.listens |= policy.uses_feedback
        check_horizon(config, self.listens)
        self._losses = losses or FlatLosses(self.names)
        self._mixer = Mixer(len(self.names))
        self._asked = np.zeros((config.lanes, len(self.names)), dtype=np.int32)
        self._left = np.full((config.lanes, len(self.names)), UNLIMITED, np.int64)
        """Tokens that lanes can still give."""
        self._open = dict(capacities or {})
        """Sources that will be through some day."""
        self._ended: list[int] = []
        """Sources that all lanes are through with; what was still owed to one may be drawn, and is given by others."""
        for name, tokens in self._open.items():
            self._left[:, self.names.index(name)] = tokens
        self._through = np.zeros(self._left.shape, np.bool_)
        self.first_through: dict[str, int] = {}
        """Step in which a source's first lane was found to be through."""
        self._sequences = 0
        self._reports: list[Feedback] = []
        self._shares_of: tuple[Mapping[str, float] | None, tuple[str, ...]] = (None, ())
        self._known: tuple[Int64, Int64] = (np.zeros(0, np.int64), np.zeros(0, np.int64))

    def __iter__(self) -> Iterator[Draw]:
        horizon, step = self.config.policy.horizon, 0
        while True:
            if step in self._turns:  # asked at every step it would cost 10 µs, a third of the step
                shape = self.plan.shape.at(step)
                batch, seq_len = shape["global_batch_size"], shape["seq_len"]
                self._change_policy(step)
            heard = [self._reports.pop(0)] if self._reports and self._reports[0].step <= step - horizon else []
            found = self._shares(step, self._policy.weights(step, heard if self._policy.uses_feedback else []))
            if found is None:
                return
            asked, shares = found
            counts = self._mixer.counts(shares, batch)
            if self._open or counts[self._ended].any():
                given = self._deal(step, counts, shares, seq_len + 1)
                if given is None:
                    return
                counts = given
            self._sequences += batch
            if self.listens:
                self._report(step, counts, shares, seq_len)
            yield Draw(step, asked, shares, counts, self._mixer.owed, seq_len)
            step += 1

    def _open_policy(self, chosen: Chosen) -> tuple[Chosen, Policy]:
        return chosen, open_policy(self.config, self._context, chosen.kind, chosen.options, chosen.initial)

    def _change_policy(self, step: int) -> None:
        """Take up the weights of the stage that begins. As `Scheduler._change_policy`."""
        chosen, before = self.plan.chosen(step), self._chosen
        if chosen != before:
            state = self._policy.state_dict()
            self._chosen, self._policy = self._open_policy(chosen)
            if chosen.goes_on_from(before):
                self._policy.load_state_dict(state)

    def _report(self, step: int, counts: Int64, shares: Int64, seq_len: int) -> None:
        """What a model would report: losses of the sources that gave something."""
        losses = self._losses.at(step)
        drawn_with = dict(zip(self.names, (shares / ONE).tolist(), strict=True))
        drawn = {name: count for name, count in zip(self.names, counts.tolist(), strict=True) if count}
        tokens = {name: count * seq_len for name, count in drawn.items()}
        told = {name: losses[name] for name in drawn}
        self._reports.append(Feedback(step, told, tokens, {name: losses[name] for name in self.names}, drawn_with))

    def _shares(self, step: int, wanted: Mapping[str, float]) -> tuple[Int64, Int64] | None:
        """(asked, used) shares of a step; None when every source that is asked for is through."""
        capped = tuple(name for name in self.plan.capped if self.plan.is_capped(name, step))
        if (wanted, capped) == self._shares_of:
            return self._known
        asked = quantize(wanted, self.names)
        shares = asked
        if capped:
            exact = dict(zip(self.names, (asked / ONE).tolist(), strict=True))
            left = {name: 0.0 if name in capped else weight for name, weight in exact.items()}
            if not any(left.values()):
                return None
            shares = quantize(left, self.names)
        self._shares_of, self._known = (dict(wanted), capped), (asked, shares)
        return self._known

    def _deal(self, step: int, counts: Int64, shares: Int64, width: int) -> Int64 | None:
        """The sequences, of `width` tokens, that the step's lanes give for those asked of them; None when a lane has
        nothing left."""
        batch, lanes = int(counts.sum()), self.config.lanes
        dealt = lanes_of(self._sequences, batch, lanes)
        sources = slots(counts, self._asked, dealt, self.config.seed, step).astype(np.int64)
        places = dealt * len(self.names) + sources
        left = self._left.reshape(-1)
        if batch > lanes:
            np.subtract.at(left, places, width)
        else:  # 10 µs faster, where no lane comes twice
            left[places] -= width
        short = left[places] < 0
        if short.any():
            # Most lanes have what they are asked for; only the rows of the others are gone through one by one.
            rows = np.flatnonzero(np.isin(dealt, dealt[short]))
            np.add.at(left, places[rows], width)
            for row in rows.tolist():
                given = self._give(int(dealt[row]), int(sources[row]), self._sequences + row, shares, width)
                if given is None:
                    return None
                sources[row] = given
            self._find_through(step)
        return np.bincount(sources, minlength=len(self.names))

    def _give(self, lane: int, source: int, sequence: int, shares: Int64, width: int) -> int | None:
        """The source of a sequence asked of a lane: another where it is through with that. As `Scheduler._pack`."""
        while True:
            if self._left[lane, source] >= width:
                self._left[lane, source] -= width
                return source
            self._through[lane, source] = True
            left = np.where(self._through[lane], 0, shares)
            total = int(left.sum())
            if total == 0:
                return None
            drawn = (sequence * GOLDEN % (1 << 64)) * total >> 64
            source = int(np.searchsorted(np.cumsum(left), drawn, side="right"))

    def _find_through(self, step: int) -> None:
        """Note sources that a first lane is through with, and give on the share of those that all are."""
        for name in list(self._open):
            through = self._through[:, self.names.index(name)]
            if through.any():
                self.first_through.setdefault(name, step)
            if through.all():
                limit = self.plan.limits.at(step)[name]
                data = {"source": name, "max_epochs": limit, "generations": 1, "reported": step}
                self._record("capped", step + self.config.policy.horizon, data)
                del self._open[name]
                self._ended.append(self.names.index(name))

    def _record(self, kind: str, step: int, data: dict[str, object]) -> None:
        self.plan.apply(self.journal.append(kind, step, data, "system"))  # type: ignore[arg-type]
