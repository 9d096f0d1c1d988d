"""The producing side of a scheduler: from the plan and where consumption stands, the batch of the next step.

    plan ──► shares ──► mixer: sequences per source ──► slots ──► (lane, source) packers ──► Produced

It may run ahead in a thread of its own (`loader.py`); what it prepared counts once it is consumed.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from data_scheduler.batch import Batch, RejectedRecord, Segments
from data_scheduler.config import DataConfig
from data_scheduler.control import settle
from data_scheduler.kept_documents import keep_small_sources
from data_scheduler.lane import ExhaustedError, LaneStream, Position
from data_scheduler.manifest import Manifest
from data_scheduler.mixture import Mixer, quantize, slots
from data_scheduler.order import GOLDEN, Int64, lanes_of
from data_scheduler.packers import PACKERS
from data_scheduler.packing import Carry, Packer
from data_scheduler.plan import Growth, Plan
from data_scheduler.policy_turns import PolicyTurns
from data_scheduler.sequences import BoolArray, Int32
from data_scheduler.source import SourceReader
from data_scheduler.state import EXHAUSTED, State, Touched
from headrace.errors import ConfigError, DataError


class Produced(NamedTuple):
    """A batch with the changes of state that its consumption means."""

    batch: Batch
    touched: list[Touched]
    owed: Int64
    asked: tuple[Int64, Int32]
    """(lanes, sources) of the global batch's slots, as planned."""
    width: int
    policy: dict[str, Any]
    wanted: dict[str, float]


class Producer:
    """One rank's share of each step, one after the other."""

    def __init__(
        self,
        config: DataConfig,
        plan: Plan,
        readers: Sequence[SourceReader],
        policies: PolicyTurns,
        *,
        dp_rank: int,
        dp_size: int,
        hashing: bool,
        replaying: bool,
    ) -> None:
        """`policies` are not asked where `replaying`: the journal knows all. With `hashing` batches have digests."""
        self.config, self.plan, self.readers, self._policies = config, plan, readers, policies
        self.names = [source.name for source in config.sources]
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._hashing, self._replaying = hashing, replaying
        self._grown: dict[str, list[Growth]] = {}
        self._new_packer = PACKERS[config.packing]

    def rewind(self, consumed: State) -> None:
        """Go on from where consumption stands."""
        self._step = consumed.step
        self._sequences = consumed.sequences
        self._sources_through: set[tuple[int, int]] = set()
        """(lane, source) pairs that have reached the limit in force."""
        self._mixer = Mixer(len(self.names))
        self._mixer.owed = consumed.owed.copy()
        self._asked = consumed.asked.copy()
        self._packers: dict[tuple[int, int], Packer] = {}
        self._places = consumed.copy()
        self._limits: Mapping[str, int | None] | None = None
        self._generations: list[int] = []
        if not self._replaying:
            self._policies.begin(self._step)
        self._policies.load(self._step, consumed.policy, consumed.wanted)
        self._shares_of: Mapping[str, float] = {}
        self._shares_known = np.zeros(0, np.int64)
        self._shape: Mapping[str, int] = {}
        # What the plan says is asked again when it has heard of an event, and at steps where it may say something else.
        self._plan_version, self._plan_steady_until = -1, 0.0

    def produce(self) -> Produced:
        """Prepare the next step: the only place where batches come from."""
        step = self._step
        version = self.plan.version
        steady = version == self._plan_version and step < self._plan_steady_until
        if not steady and not self._replaying:
            self._policies.change(step)
        wanted = None if self._replaying else self._policies.ask(step)
        if steady and (wanted is None or wanted == self._policies.wanted):
            shares = self._shares_known
        else:
            shares = self._shares(step, wanted)
            self._shape = self.plan.shape.at(step)
            self.see_files_of(step)
            self._plan_version, self._plan_steady_until = version, self.plan.steady_until(step)
        batch_size, width = self._shape["global_batch_size"], self._shape["seq_len"] + 1
        counts = self._mixer.counts(shares, batch_size)
        lanes = lanes_of(self._sequences, batch_size, self.config.lanes)
        sources = slots(counts, self._asked, lanes, self.config.seed, step)
        own = np.arange((self._dp_rank - self._sequences) % self._dp_size, batch_size, self._dp_size, dtype=np.int64)
        tokens = np.empty((len(own), width), dtype=np.int64)
        source_ids = sources[own].astype(np.int64)
        packed: list[Segments] = []
        touched: list[Touched] = []
        asked = zip(own.tolist(), lanes[own].tolist(), source_ids.tolist(), tokens, strict=True)
        for row, (slot, lane, source, out) in enumerate(asked):
            given, segments = self._pack(lane, self._sequences + slot, source, shares, out, touched)
            packed.append(segments.with_whole_prefixes(width))
            if given != source:
                source_ids[row] = given
        starts, ids, offsets, weights, prefixes = map(list, zip(*packed, strict=True))
        batch = Batch(
            step,
            tokens,
            starts,
            source_ids,
            ids,
            offsets,
            own,
            weights,
            prefixes,
            self._exhausted(),
            self._take_rejects(),
        )
        if self._hashing:
            _ = batch.digests
        self._step += 1
        self._sequences += batch_size
        return Produced(
            batch, touched, self._mixer.owed, (lanes, sources), width, self._policies.state(), self._policies.wanted
        )

    def _pack(
        self, lane: int, sequence: int, source: int, shares: Int64, row: Int64, touched: list[Touched]
    ) -> tuple[int, Segments]:
        """(source, segments) of a sequence, from `source` or, where its lane is through with that, another."""
        while True:
            if (lane, source) not in self._sources_through:
                packer = self._packers.get((lane, source)) or self._packer(lane, source)
                try:
                    segments = packer.pack(row)
                except ExhaustedError:
                    reader = self.readers[source]
                    reached = Carry(width=reader.max_epochs or 0, bins=EXHAUSTED, generations=reader.generations)
                    touched.append(Touched(lane, source, packer.position, reached))
                    self._places.positions[lane, source] = packer.position + reached
                    self._packers.pop((lane, source))
                    self._sources_through.add((lane, source))
                else:
                    touched.append(Touched(lane, source, packer.position, packer.carry))
                    return source, segments
            source = self._substitute(lane, sequence, shares)

    def _substitute(self, lane: int, sequence: int, shares: Int64) -> int:
        """The source that takes the place of one the lane is through with: the others, in proportion to their shares.

        Multiples of the golden ratio spread evenly, so a few sequences already follow the shares.
        """
        left = shares.copy()
        for through, source in self._sources_through:
            if through == lane:
                left[source] = 0
        total = int(left.sum())
        if total == 0:
            raise DataError(
                f"step {self._step}: every source with a weight has been seen max_epochs times; raise max_epochs, add "
                "data, or end the run here"
            )
        drawn = (sequence * GOLDEN % (1 << 64)) * total >> 64
        return int(np.searchsorted(np.cumsum(left), drawn, side="right"))

    def _packer(self, lane: int, source: int) -> Packer:
        """A packer that goes on where the lane stands."""
        position, carry = self._places.place(lane, source)
        if carry.bins == EXHAUSTED:  # under a limit that was raised since
            carry = Carry()
        packer = self._new_packer(LaneStream(self.readers[source], lane, position), carry)
        self._packers[lane, source] = packer
        return packer

    def _exhausted(self) -> BoolArray:
        """bool[sources]: whether every lane of this rank is through with the source."""
        through = np.zeros(len(self.names), np.bool_)
        if self._sources_through:
            number = np.bincount([source for _, source in self._sources_through], minlength=len(self.names))
            np.equal(number, self.config.lanes // self._dp_size, out=through)
        return through

    def see_files_of(self, step: int) -> None:
        """Let the readers see the files and keep the limits of `step`, and find the lanes that are through."""
        limits = self.plan.limits.at(step) or {}
        seen = [self.plan.generations(name, step) if self.plan.grown else 1 for name in self.names]
        if limits == self._limits and seen == self._generations:
            return
        self._limits, self._generations = limits, seen
        for reader, name, generations in zip(self.readers, self.names, seen, strict=True):
            grown = self.plan.grown.get(name, [])
            if grown != self._grown.get(name, []):
                self._grown[name] = grown
                reader.grow([Manifest.from_data(growth.manifest) for growth in grown], self.plan.left_out(name))
                keep_small_sources(self.readers)
            if reader.left_out and reader.generations != generations:
                self._reopen(self.names.index(name))
            reader.generations, reader.max_epochs = generations, limits.get(name)
        carries = self._places.positions[:, :, len(Position._fields) :]
        through = carries[:, :, Carry._fields.index("bins")] == EXHAUSTED
        through &= carries[:, :, Carry._fields.index("width")] == [limits.get(name) or 0 for name in self.names]
        through &= carries[:, :, Carry._fields.index("generations")] == seen
        own = np.arange(self.config.lanes) % self._dp_size == self._dp_rank
        self._sources_through = {(lane, source) for lane, source in np.argwhere(through & own[:, None]).tolist()}

    def _reopen(self, source: int) -> None:
        """Let lanes open a source again where they stand: other documents are left out from here on."""
        for lane in [lane for lane, of in self._packers if of == source]:
            packer = self._packers.pop((lane, source))
            self._places.positions[lane, source] = packer.position + packer.carry

    def _shares(self, step: int, wanted: Mapping[str, float] | None) -> Int64:
        """Each source's share of a step, int64[sources]; nothing for sources that have reached their limit.

        `wanted`: by the policy; None: the journal knows all.
        """
        if wanted is not None:
            self._policies.record(step, wanted)
        weights = self._decided_weights(step)
        quarantined = self.plan.quarantined(step)
        weights = self.plan.without_quarantined(weights, step)
        capped = [name for name in list(self.plan.capped) if self.plan.is_capped(name, step)]
        if capped:
            weights = {name: 0.0 if name in capped else weight for name, weight in weights.items()}
        if (capped or quarantined) and not any(weights.values()):
            raise DataError(
                f"step {step}: every source with a weight is under quarantine or has been seen max_epochs times; undo "
                "a quarantine, raise max_epochs, add data, or end the run here"
            )
        if weights != self._shares_of:
            self._shares_of, self._shares_known = dict(weights), quantize(weights, self.names)
        if quarantined and quarantined != self.plan.quarantined(step - 1):
            out = [self.names.index(name) for name in sorted(quarantined)]
            self._mixer.owed = settle(self._mixer.owed, self._shares_known, out)
        return self._shares_known

    def _decided_weights(self, step: int) -> Mapping[str, float]:
        weights: Mapping[str, float] | None = self.plan.mixture.at(step)
        if weights is None:
            raise ConfigError(f"the journal has no mixture for step {step}; the run never got there")
        return weights

    def _take_rejects(self) -> list[RejectedRecord]:
        taken: list[RejectedRecord] = []
        for reader in self.readers:
            if reader.rejects:
                taken += reader.rejects
                reader.rejects = []
        return taken
