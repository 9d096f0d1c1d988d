"""The engine: from a configuration and a journal to batches, one data-parallel rank's share of each step.

    journal ──► plan: weights, batch shape of step k
                  │
                  ▼
    mixer: sequences per source ──► slots: source of every slot of the global batch
                                       │  slot i belongs to a lane (`order.lanes_of`), lane ℓ to rank ℓ mod DP
                                       ▼
    (lane, source) streams: chunks ─► documents ─► tokens ──► packer ──► Batch

Worked example: L = 4 lanes, global batch 4, DP = 2. Step 0 draws sequences 0…3 from lanes 0…3; rank 0 packs those of
lanes 0 and 2, rank 1 those of 1 and 3. With DP = 1 one rank packs all four, the same ones in the same slots.

`Scheduler` opens, journals, hands out batches and keeps what was consumed; `producer.py` prepares them, in a thread of
its own, and `policy_turns.py` asks the policy.

`Scheduler` knows numpy only; `data_scheduler.dataset.DataScheduler` is the same thing as a PyTorch `IterableDataset`.
"""

import os
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data_scheduler.batch import Batch
from data_scheduler.config import DataConfig, SourceConfig
from data_scheduler.control import Decision
from data_scheduler.curriculum import banded, take_manifests
from data_scheduler.encoder import Encoder, load_encoder
from data_scheduler.identity import beginning, check_same_run, sample_texts, settled
from data_scheduler.journal import Event, Journal, Kind
from data_scheduler.kept_documents import keep_small_sources
from data_scheduler.lane import Position
from data_scheduler.layout_index import LayoutIndex
from data_scheduler.listing import File
from data_scheduler.loader import Loader
from data_scheduler.manifest import Manifest, check_unchanged
from data_scheduler.mixture import quantize
from data_scheduler.packing import Carry
from data_scheduler.paths import list_files
from data_scheduler.plan import Chosen, Plan
from data_scheduler.policies import Feedback, Policy
from data_scheduler.policy_context import PolicyInputs, run_context
from data_scheduler.policy_turns import PolicyTurns, new_policy, try_policies_of_stages
from data_scheduler.producer import Produced, Producer
from data_scheduler.reports import Reports
from data_scheduler.source import SourceReader
from data_scheduler.stages import check_layout, configured_events, turns
from data_scheduler.state import State
from data_scheduler.timeline import Timeline
from data_scheduler.transforms.source_transforms import open_transforms
from data_scheduler.unit_cache import UnitCache
from headrace.errors import ConfigError, HeadraceError
from headrace.version import __version__


class Scheduler:
    """An endless iterator of `Batch`. Not thread-safe; one consumer."""

    def __init__(
        self,
        config: DataConfig,
        *,
        dp_rank: int = 0,
        dp_size: int = 1,
        run_dir: str | os.PathLike[str] | None = None,
        journal: Journal | None = None,
        encoder: Encoder | None = None,
        replaying: bool = False,
        watch: bool | None = None,
        hashing: bool = False,
        run_steps: int | None = None,
    ) -> None:
        """Open the sources, or those of the journal in `run_dir` when there is one.

        Rank 0 writes the journal; other ranks must be made after rank 0's so that they read its manifests. With
        `replaying` the journal alone decides and nothing is added to it. Sources with `watch` are looked after here
        when there is one rank (`watch` overrides that); with several, hand what `new_files` finds on one of them to
        `grow` on all. With `hashing` the digests of batches are made along with them, in the loader's thread, and not
        when they are first asked for. `run_steps` is the length of the whole run, for policies that plan for it.
        Raises ConfigError, LayoutError or DataError.
        """
        self._replaying, self._hashing = replaying, hashing
        self._dp_rank, self._dp_size = dp_rank, dp_size
        if journal is None:
            path = None if run_dir is None else Path(run_dir) / "journal.jsonl"
            journal = Journal(path, writable=dp_rank == 0 and not replaying)
        self.journal = journal
        self._recording = threading.Lock()
        fresh = not journal.events
        config = banded(config, journal)
        self.names = [source.name for source in config.sources]
        self.config = config = settled(config, None if fresh else beginning(journal).data["data"])
        # Of a run that goes on only the stages still to come count; where it goes on is not known before `_begin`.
        check_layout(config.lanes, turns(config, run_steps, Timeline()) if fresh else [], dp_rank, dp_size)
        known = {event.data["source"]: Manifest.from_data(event.data) for event in journal.of("manifest")}
        for manifest in [*known.values(), *(Manifest.from_data(event.data) for event in journal.of("grown"))]:
            check_unchanged(manifest)
        self._index = LayoutIndex(config.cache_folder() / "index.sqlite")
        new = take_manifests([source for source in config.sources if source.name not in known], self._index)
        manifests = known | new
        self.encoder = encoder or load_encoder(
            config.tokenizer, fast=config.fast_tokenizer, samples=sample_texts(config, manifests)
        )
        if not fresh:
            check_same_run(config, journal, self.encoder.fingerprint)
        for source in config.sources:
            paths = (path for path, _ in manifests[source.name].files)
            open_transforms(source, paths, self.encoder, config.seed, config.objectives_of(source))
        self._run_steps, self._inputs = run_steps, PolicyInputs(journal)
        self._context = run_context(config, manifests, self.encoder, self._inputs, lambda: self.plan, run_steps)
        configured = {source.name: source.weight for source in config.sources}
        policy = self._new_policy(config.policy.kind, config.policy.options, configured)
        self._asking: tuple[Chosen, Policy] | None = None
        try_policies_of_stages(config, self._context)
        # Nothing was written so far: a wrong path or setting must not leave half a run behind.
        self._record_sources(fresh, new)
        for given in self._inputs.take_new():
            journal.append("policy_input", 0, given, "system")
        self.plan = Plan(journal)
        self._resuming = not fresh
        self._begun = False
        cache = UnitCache()
        self.readers = []
        for source in config.sources:
            self.readers.append(SourceReader(source, manifests[source.name], config, self.encoder, cache))
        keep_small_sources(self.readers)
        self._watched = [source for source in config.sources if source.watch]
        self._watches_itself = dp_size == 1 if watch is None else watch
        self._last_look: dict[str, dict[str, File]] = {}
        self._consumed = State.fresh(config.lanes, self.names)
        self._reports = Reports()
        self._producer = Producer(
            config,
            self.plan,
            self.readers,
            PolicyTurns(config, self._context, self.plan, policy, self._reports, self._record),
            dp_rank=dp_rank,
            dp_size=dp_size,
            hashing=hashing,
            replaying=replaying,
        )
        self._loader: Loader[Produced] | None = None
        self._rewind()

    # -- consuming -----------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if not self._begun and not self._replaying:
            self._begin()
        began = time.perf_counter()
        if self.config.prefetch == 0:
            produced = self._producer.produce()
        else:
            if self._loader is None:
                self._reports.begin()
                self._loader = Loader(self._producer.produce, self.config.prefetch)
                # Also where nobody closes this: an interpreter that ends while the thread encodes or reads waits for it
                # and it for the interpreter.
                self._end_loader = weakref.finalize(self, self._reports.end, self._loader)
            produced = self._loader.get()
        produced.batch.wait_s = time.perf_counter() - began
        self._consumed.consume(produced.touched, produced.owed, produced.asked, produced.width)
        self._consumed.policy, self._consumed.wanted = produced.policy, produced.wanted
        self._consumed.keep_feedback_from(self._consumed.step - self.config.policy.horizon)
        if self._watched and self._watches_itself and not self._replaying and self.is_time_to_look:
            self.grow(self.new_files())
        return produced.batch

    @property
    def is_time_to_look(self) -> bool:
        """Whether new files are due to be looked for, after the batch given last."""
        return bool(self._watched) and self._consumed.step % self.config.watch_every == 0

    def new_files(self) -> dict[str, dict[str, Any]]:
        """Files behind the paths of watched sources that are in no manifest yet, by source, as `grow` wants them.

        A file counts once two looks in a row found it with the same size and time: one that is still being written
        waits for the next. Raises ConfigError or DataError.
        """
        found: dict[str, dict[str, Any]] = {}
        for source in self._watched:
            reader = self.readers[self.names.index(source.name)]
            known = {path for path, _ in reader.manifest.files}
            for growth in self.plan.grown.get(source.name, []):
                known |= {path for path, _ in Manifest.from_data(growth.manifest).files}
            files = list_files(source.paths, f"source {source.name!r}", source.format)
            look = {file.path: file for file in files if file.path not in known and file.size}
            before = self._last_look.get(source.name, {})
            ready = [file for path, file in look.items() if before.get(path) == file]
            self._last_look[source.name] = look
            if ready:
                found[source.name] = Manifest.of(source, ready, self._index).to_data()
        return found

    def grow(self, found: Mapping[str, Mapping[str, Any]]) -> None:
        """Let the files of `new_files` join from `horizon` steps after the batch given last; every rank must."""
        for name in sorted(found):
            data = {**found[name], "reported": self._consumed.step - 1}
            self._record("grown", self._consumed.step - 1 + self.config.policy.horizon, data, "system")

    def feedback(
        self,
        step: int,
        source_loss: Mapping[str, float],
        source_tokens: Mapping[str, int],
        exhausted: Iterable[str] = (),
    ) -> None:
        """Report a trained step's loss per token and tokens per source, summed over all ranks; every rank must.

        `exhausted` names the sources that are in `Batch.exhausted` on every rank: from step + horizon on their share is
        planned for the others, until then lanes replace them sequence by sequence.
        """
        for name in exhausted:
            limit = self.plan.limits.at(step).get(name)
            seen = self.plan.generations(name, step)
            known = [(cap.max_epochs, cap.generations) for cap in self.plan.capped.get(name, [])]
            if limit is not None and (limit, seen) not in known:
                data = {"source": name, "max_epochs": limit, "generations": seen, "reported": step}
                self._record("capped", step + self.config.policy.horizon, data, "system")
        validation: dict[str, float] = {}
        for early in self._consumed.feedback:
            if early.step == step:  # from `validated`, before the step
                validation.update(early.validation_loss)
        shares = self._shares_drawn_with(step)
        report = Feedback(step, dict(source_loss), dict(source_tokens), validation, shares)
        self._consumed.feedback = [other for other in self._consumed.feedback if other.step != step] + [report]
        self._reports.add(report)

    @property
    def next_step(self) -> int:
        """The step that will be given next."""
        return self._consumed.step

    @property
    def earliest_change(self) -> int:
        """The first step that no rank can have begun to prepare: what is decided now may shape it and those after it.

        `prefetch` steps are ready and one more is being made: prefetch + 1 steps after the next, whatever was reached.
        """
        return self._consumed.step + (self.config.prefetch + 1 if self.config.prefetch else 0)

    def take(self, decision: Decision, by: str) -> Event:
        """Journal what a person decided and let it take effect; every rank must, between the same two steps."""
        if decision.kind == "policy":
            # What it asks about the data is measured now, and journaled by every rank at the same place.
            self._new_policy(decision.data["kind"], decision.data["options"], self.plan.chosen(decision.step).initial)
            for given in self._inputs.take_new():
                self._record("policy_input", decision.step, given, "system")
        return self._record(decision.kind, decision.step, decision.data, by)

    def with_source(self, source: SourceConfig) -> "Scheduler":
        """This run from the next step on with one more source, whose entry was journaled; replaces this object.

        What was prepared ahead is dropped and made again. Every rank must. Raises ConfigError or DataError.
        """
        self.close()
        continued = Scheduler(
            self.config.model_copy(update={"sources": [*self.config.sources, source]}),
            dp_rank=self._dp_rank,
            dp_size=self._dp_size,
            journal=self.journal,
            encoder=self.encoder,
            watch=self._watches_itself,
            hashing=self._hashing,
            run_steps=self._run_steps,
        )
        continued.load_state_dict(self.state_dict())
        return continued

    def try_policy(
        self, kind: str, options: Mapping[str, Any], joining: tuple[SourceConfig, Manifest] | None = None
    ) -> None:
        """Raise ConfigError when a policy cannot be used from here on; `joining`: a source that joins with it.

        Without `joining` it is one that starts afresh; with it, one that goes on from the policy of the next step.
        """
        initial, config, context = dict(self.plan.chosen(self.next_step).initial), self.config, self._context
        if joining is not None:
            source, manifest = joining
            initial[source.name] = source.weight
            config = config.model_copy(update={"sources": [*config.sources, source]})
            manifests = {reader.config.name: reader.manifest for reader in self.readers} | {source.name: manifest}
            context = run_context(config, manifests, self.encoder, self._inputs, lambda: self.plan, self._run_steps)
        try:
            policy = new_policy(config, context, kind, options, initial)
            policy.load_state_dict({} if joining is None else self._consumed.policy)
            quantize(policy.weights(self.next_step, []), [source.name for source in config.sources])
        except HeadraceError:
            raise
        except Exception as error:
            raise ConfigError(f"policy {kind!r} cannot go on from here: {type(error).__name__}: {error}") from None

    @property
    def wants_validation(self) -> bool:
        """Whether the policy wants held-out losses measured now, before the next step; give them to `validated`."""
        # The loader's policy may be some steps ahead, on one rank further than on another.
        chosen = self.plan.chosen(self._consumed.step)
        if self._asking is None or self._asking[0] != chosen:
            self._asking = chosen, self._new_policy(chosen.kind, chosen.options, chosen.initial)
        wants = getattr(self._asking[1], "wants_validation", None)
        return wants is not None and bool(wants(self._consumed.step))

    def validated(self, losses: Mapping[str, float]) -> None:
        """Report held-out losses per token and source, measured since the last step; every rank must, and the same.

        The policy hears them with the next step's report.
        """
        self._consumed.feedback.append(Feedback(self._consumed.step, validation_loss=dict(losses)))

    def state_dict(self) -> dict[str, Any]:
        """Where consumption stands: exact whatever was prefetched. Holds this rank's lanes; `merge` joins ranks."""
        return self._consumed.to_dict(self._dp_rank, self._dp_size)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of this run, saved under any data-parallel size and holding all lanes needed here.

        Raises ConfigError when the state belongs to other lanes or lacks some.
        """
        self.close()
        self._consumed = State.from_dict(state, self.config.lanes, self.names, self._dp_rank, self._dp_size)
        self._resuming, self._begun = True, False
        self._rewind()

    def place(self, lane: int, source: int) -> tuple[Position, Carry]:
        """Where consumption stands in one of this rank's lanes."""
        return self._consumed.place(lane, source)

    def see_files_of(self, step: int) -> None:
        """Make the readers see the files and limits of `step`, for looking at chunks without preparing a batch."""
        self._producer.see_files_of(step)

    def close(self) -> None:
        """Stop the loader thread."""
        if self._loader is not None:
            self._end_loader()
            self._loader = None

    def _rewind(self) -> None:
        """Set the producing side to where consumption stands."""
        self._reports.reset(report for report in self._consumed.feedback if report.step < self._consumed.step)
        self._producer.rewind(self._consumed)

    def _new_policy(self, kind: str, options: Mapping[str, Any], initial: Mapping[str, float]) -> Policy:
        return new_policy(self.config, self._context, kind, options, initial)

    def _shares_drawn_with(self, step: int) -> dict[str, float]:
        """The mixture a past step was drawn with, summing to 1; nothing for sources through or under quarantine."""
        asked = self.plan.asked(step) or {}
        weights = {name: 0.0 if self.plan.is_capped(name, step) else weight for name, weight in asked.items()}
        total = sum(weights.values())
        return {name: weight / total for name, weight in weights.items()} if total else {}

    # -- journal -------------------------------------------------------------------------------------------------

    def _record(self, kind: Kind, step: int, data: dict[str, Any], by: str) -> Event:
        with self._recording:  # the plan hears of events in the journal's order
            event = self.journal.append(kind, step, data, by)
            self.plan.apply(event)
        return event

    def _begin(self) -> None:
        """Journal where iteration begins, and what the configuration decides from here on."""
        ahead = turns(self.config, self._run_steps, self.plan.shape, self._consumed.step)
        check_layout(self.config.lanes, ahead, self._dp_rank, self._dp_size)
        if self._resuming:
            self._record("resumed", self._consumed.step, {"dp_size": self._dp_size}, "system")
        for kind, step, data in list(configured_events(self.config, self._run_steps, self.plan, self._consumed.step)):
            self._record(kind, step, data, "config")
        self._begun = True

    def _record_sources(self, fresh: bool, new: Mapping[str, Manifest]) -> None:
        """Journal the start of the run, and the sources that enter it now."""
        if fresh:
            config = self.config.model_dump(mode="json")
            started = {"version": __version__, "data": config, "tokenizer": self.encoder.fingerprint}
            self.journal.append("run_started", 0, started, "config")
        # A source that is added enters where the run will be resumed: at its newest checkpoint.
        step = max((event.step for event in self.journal.of("checkpoint")), default=0)
        for source in self.config.sources:
            if source.name in new:
                if not fresh:
                    self.journal.append("source_added", step, {"source": source.model_dump(mode="json")}, "config")
                self.journal.append("manifest", step, new[source.name].to_data(), "system")
