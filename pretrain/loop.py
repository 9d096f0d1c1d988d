"""A run from start, or from its newest checkpoint, to end: data, steps, evaluation, checkpoints, metrics.

The run folder holds all there is:

    config.yaml  journal.jsonl  metrics.jsonl  rejects.jsonl  checkpoints/  control/  data_state/  log/
"""

import gc
import math
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from data_scheduler import Journal, Scheduler, batch_sha256
from data_scheduler.batch import Batch, RejectedRecord
from data_scheduler.config import SourceConfig
from data_scheduler.stages import tokens_before
from data_scheduler.state import Snapshots
from headrace.errors import CheckpointError, ConfigError, ExitCode
from parallel import accelerator, exchange, process_groups
from parallel.layout import Layout
from pretrain import checkpoint
from pretrain.alerts.run import Alerts, alerting, usable_hooks
from pretrain.config import RunConfig, dump_config
from pretrain.control.desk import Stand
from pretrain.control.live import Live, setting, with_live_sources
from pretrain.evaluate import HeldOut
from pretrain.layouts import layout_from, layouts_ahead
from pretrain.learning_rate import learning_rate
from pretrain.metrics import Record, Sink, open_sinks
from pretrain.metrics.sink import closing
from pretrain.metrics.vitals import Vitals, of_ranks
from pretrain.microbatch import split_batch
from pretrain.models.vocabulary import check_vocabulary, padded_vocab_size
from pretrain.monitor.serve import beside_run
from pretrain.progress import Progress
from pretrain.recovery.fault_points import reach
from pretrain.recovery.fetching import open_second_place, restore_journal
from pretrain.recovery.health import check_health, new_guard
from pretrain.recovery.newest import newest_whole
from pretrain.recovery.rollback import WaysBack
from pretrain.recovery.stragglers import Stragglers
from pretrain.recovery.watchdog import Watchdog
from pretrain.rejects import Rejects
from pretrain.saves import Saves
from pretrain.selection.selection import open_selection
from pretrain.stages import parallel_of, settings_of
from pretrain.step import TrainState, build_state, train_step
from pretrain.step_record import Circumstances, by_source, step_record
from pretrain.stop_signals import stopping_on_signals


def train(config: RunConfig) -> ExitCode:
    """Train until `train.steps`, or until a signal asks to save and leave; every process of the run calls this.

    Returns DONE, or RECOVERABLE when a signal ended the run before its last step (start it again and it goes on).
    Raises HeadraceError for anything a person has to mend.
    """
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    accelerator.set_deterministic(config.train.deterministic)
    config = with_live_sources(config)
    layout = layout_of(config, process_groups.environment_world_size())
    ranks = process_groups.initialize(layout, config.train.seed)
    try:
        hooks = exchange.from_first_rank(lambda: usable_hooks(config), ranks.rank)
        with alerting(config, hooks, ranks.rank == 0) as alerts:
            code = _through_all_layouts(config, layout, ranks, alerts)
            alerts.ended(code)
    except RuntimeError as error:
        if accelerator.is_nondeterministic(error):
            raise ConfigError(f"train.deterministic: {str(error).partition('. ')[0]}; set it to false") from None
        if not process_groups.is_lost_peer(error):
            raise
        sys.stderr.write(f"headrace: rank {ranks.rank}: another process is gone: {str(error).splitlines()[0]}\n")
        return ExitCode.RECOVERABLE
    # Only here: a rank that leaves with an error must not wait for the others; the launcher ends them.
    process_groups.shutdown()
    return code


def layout_of(config: RunConfig, world_size: int) -> Layout:
    """The layout on `world_size` processes that the run goes on with; raises LayoutError when this one, or that of a
    later stage, does not fit the run."""
    # A vocabulary that is not configured is padded to fit any layout.
    return layouts_ahead(config, world_size, padded_vocab_size(config, 1))[0]


def _through_all_layouts(config: RunConfig, layout: Layout, ranks: process_groups.Ranks, alerts: Alerts) -> ExitCode:
    """A run, and where a stage has another layout the rest of it anew from the checkpoint that was just saved."""
    stop_asked = False
    with Watchdog(config.recovery.watchdog_s, Path(config.run.dir) / "log", ranks.rank) as watchdog:
        while True:
            run = Run(config, layout, ranks, watchdog, alerts)
            run.stop_asked |= stop_asked
            code = run.go()
            watchdog.rest()
            watchdog.more.clear()
            if run.next_layout is None and not run.goes_back:
                return code
            config, layout, stop_asked = run.config, run.next_layout or layout, run.stop_asked
            del run  # the model of the old layout, and all that uses its groups
            gc.collect()
            ranks = process_groups.rearrange(layout, config.train.seed)


class Run:
    """One process's part of a run."""

    def __init__(
        self,
        config: RunConfig,
        layout: Layout,
        ranks: process_groups.Ranks,
        watchdog: Watchdog,
        alerts: Alerts | None = None,
    ) -> None:
        self.config, self.layout, self.ranks = config, layout, ranks
        self.watchdog, self.alerts = watchdog, alerts
        self.run_dir = Path(config.run.dir)
        self.checkpoints = checkpoint.Checkpoints(self.run_dir)
        self.second = open_second_place(config.checkpoint)
        self.rejects = Rejects(self.run_dir)
        exchange.only_first_rank(self._open_folder, ranks.rank)
        self.scheduler = exchange.first_rank_first(self._open_scheduler, ranks.rank)
        # Sources with bands have become these.
        own = {"sources": self.scheduler.config.sources, "stages": self.scheduler.config.stages}
        data = config.data.model_copy(update=own)
        self.config = config = config.model_copy(update={"data": data})
        tokens = self.scheduler.encoder.vocab_size
        vocab_size = padded_vocab_size(config, tokens)
        check_vocabulary(vocab_size, tokens)
        self.held_out = self._read_held_out()
        # Not before: reading the data for the first time may take hours.
        watchdog.more["data loader"] = lambda: f"next step {self.scheduler.next_step}, {self.scheduler.names}"
        watchdog.beat("building the model")
        self.state: TrainState = build_state(config, layout, ranks, vocab_size)
        self.state.beat = watchdog.beat
        self.stragglers = Stragglers(
            config.recovery, ranks, self.state.chunks[0].config, comparable=not layout.fully_sharded
        )
        self.state.guard = new_guard(config.recovery, self.scheduler.journal, config.train.precision)
        self.selection = exchange.agree(lambda: open_selection(config, layout, ranks, self.scheduler.encoder))
        self.done = checkpoint.Progress(0, 0)
        self.stop_asked = False
        self.saves = Saves(self.checkpoints, config.checkpoint, ranks, self._note)
        self.vitals = Vitals(self.run_dir, self.scheduler.journal) if ranks.rank == 0 else None
        self.progress: Progress | None = None
        self.next_layout: Layout | None = None
        """What the run goes on with when `go` has ended because a stage begins that has another layout."""
        self.goes_back = False
        """`go` has ended because the loss guard wants the run to go on from its newest checkpoint."""

    # -- the loop ------------------------------------------------------------------------------------------------

    def go(self) -> ExitCode:
        """Resume if there is something to resume, then step until the end."""
        resumed = self._resume()
        steps, first = self.config.train.steps, self.done.step
        if first >= steps:
            self._say(f"{self.run_dir} is at step {first}; train.steps={steps} is done. Raise it to go on.")
            self.saves.copies.finish(self.watchdog.beat)
            return ExitCode.DONE
        exchange.only_first_rank(self._write_config, self.ranks.rank)
        with closing(self._open_sinks()) as sinks:
            code = self._go_with(sinks, first, resumed)
            self.scheduler.close()
            if self.done.step == steps and not self.goes_back:
                self.scheduler.journal.append("run_finished", self.done.step, {"tokens": self.done.tokens}, "system")
            self.scheduler.journal.close()
        return code

    def _go_with(self, sinks: Sequence[Sink], first: int, resumed: bool) -> ExitCode:
        with (
            Live(self.config.control, self.run_dir, self.ranks.rank) as self.live,
            stopping_on_signals(self._ask_to_stop),
            self._dashboard(),
            Progress(self.config.train.steps, first, self._shows_progress(), given=self._tokens_before) as progress,
        ):
            self.progress = progress
            if not resumed:
                self._evaluate(sinks, progress)
            try:
                return self._go_on(sinks, progress)
            except BaseException:
                self.saves.abandon()
                raise

    def _go_on(self, sinks: Sequence[Sink], progress: Progress) -> ExitCode:
        """Step until the end, or until asked to stop."""
        steps, every = self.config.train.steps, self.config.checkpoint.every
        stop, halt = self._between_steps(progress), False
        while self.done.step < steps and not stop and not halt and self.next_layout is None:
            self._step(sinks, progress)
            at = self.done.step
            if self.goes_back:
                break
            due = self._due(setting(self.scheduler, "eval_every", self.config.train.eval_every))
            if due or at == steps or self.scheduler.wants_validation:
                self._evaluate(sinks, progress)
            if (every and at % every == 0) or at == steps:
                self._save(behind=self.config.checkpoint.behind)  # before a pause that may last for hours
            stop = self._between_steps(progress)
            halt = setting(self.scheduler, "stop_at", -1) == at
            if not stop and not halt and at < steps:
                self.next_layout = self._other_layout(at)
        if stop or halt or self.next_layout is not None:
            self._save()
        self.saves.finish(self.scheduler)
        if not self.goes_back and self.next_layout is None:
            self.saves.copies.finish(self.watchdog.beat)
        self.saves.copies.close()
        if self.goes_back or self.next_layout is not None:
            self.live.pausing = "the run goes on from its checkpoint in a moment; nothing was changed, ask again"
        if self.goes_back:
            return ExitCode.RECOVERABLE
        if self.next_layout is not None:
            self._tell(progress, f"stage begins at step {self.done.step} in another layout: {self.next_layout}")
            return ExitCode.RECOVERABLE
        if stop and self.done.step < steps:
            where = f"saved at step {self.done.step}" if self.done.step else "nothing was done yet"
            self._tell(progress, f"asked to stop: {where}; the same command goes on from there")
            return ExitCode.RECOVERABLE
        if halt and self.done.step < steps:
            self._tell(progress, f"stop-at: saved at step {self.done.step}; the same command goes on from there")
        self.live.over = f"the run has ended at step {self.done.step}"
        return ExitCode.DONE

    def _other_layout(self, step: int) -> Layout | None:
        """The layout of `step`, where it is another than the one at hand."""
        parallel = parallel_of(self.config, self.scheduler.plan.shape.at(step).get("stage"))
        layout = layout_from(parallel, self.layout.world_size)
        return None if layout == self.layout else layout

    def _between_steps(self, progress: Progress) -> bool:
        """Carry out what people asked, and wait while they want a pause; True when asked to stop."""
        told = False
        while True:
            stop, asked, writing = exchange.largest(
                [float(self.stop_asked), float(self.live.is_asked), float(self.saves.is_writing)]
            )
            if not writing:
                self.saves.finish(self.scheduler)
            self.saves.copies.hear()
            if asked:
                self._obey(progress)
            paused = setting(self.scheduler, "paused", False) and self.done.step < self.config.train.steps
            if stop or not paused:
                return bool(stop)
            if not told:
                self._tell(progress, f"paused before step {self.done.step}; `headrace ctl RUN resume` goes on")
                told = True
            self.watchdog.beat(f"paused before step {self.done.step}")
            self.live.wait()

    def _obey(self, progress: Progress) -> None:
        """Let every rank take the commands that wait."""
        self.watchdog.beat(f"commands before step {self.done.step}")
        for decision, by in self.live.obey(Stand(self.scheduler, self.config.train.steps, self.done.tokens)):
            kind, step = decision.kind, decision.step
            self.watchdog.beat(f"command {kind}")
            if by != "system":
                self._tell(progress, f"{kind} from step {step} on, by {by}: {decision.data['why']}".rstrip(": "))
            if kind == "source_added":
                self._add_source(SourceConfig.model_validate(decision.data["source"]))
            elif kind == "save_asked":
                self._save()

    def _add_source(self, source: SourceConfig) -> None:
        """Go on with one more source, as if the run had been resumed here with it."""
        self.scheduler = exchange.agree(lambda: self.scheduler.with_source(source))
        data = self.config.data.model_copy(update={"sources": [*self.config.data.sources, source]})
        self.config = self.config.model_copy(update={"data": data})
        self.state.config, self.state.num_sources = self.config, len(data.sources)
        self.held_out = self._read_held_out()
        exchange.only_first_rank(self._write_config, self.ranks.rank)

    def _step(self, sinks: Sequence[Sink], progress: Progress) -> None:
        """One step, and its record."""
        began = time.perf_counter()
        scale = setting(self.scheduler, "lr_scale", 1.0)
        self.watchdog.beat(f"step {self.done.step}")
        reach("step: before the batch")
        batch = next(self.scheduler)
        reach("step: batch at hand")
        shape = self.scheduler.plan.shape
        stage = self.state.stage = settings_of(self.config, shape.at(batch.step))
        every = self.config.metrics.dynamics.every
        self.state.measured = bool(every) and batch.step % every == 0
        size = stage.micro_batch_size
        microbatches = split_batch(
            batch.tokens, batch.starts, batch.source_ids, size, batch.weights, batch.prefix_lengths
        )
        lr = learning_rate(self.config, shape, batch.step) * stage.lr_scale * scale
        if self.state.guard is not None:
            self.state.guard.begin(batch.step)
            lr *= self.state.guard.lr_scale(batch.step)
        self.stragglers.begin(batch.step)
        if self.selection is None:
            result = train_step(self.state, microbatches, lr)
        else:
            result = self.selection.step(self.state, microbatches, lr, batch.step)
        losses, tokens = by_source(result, self.scheduler.names)
        reach("step: after the update")
        self.scheduler.feedback(batch.step, losses, tokens, self._exhausted(batch))
        if self.scheduler.is_time_to_look:
            self.scheduler.grow(exchange.from_first_rank(self.scheduler.new_files, self.ranks.rank))
        self.done = checkpoint.Progress(batch.step + 1, self.done.tokens + sum(tokens.values()))
        sha256 = self._global_hash(batch)
        took = time.perf_counter() - began
        wait, rejects, memory = exchange.largest(
            [batch.wait_s, float(len(batch.rejects)), float(accelerator.max_memory_allocated())]
        )
        if rejects:
            self._record_rejects(batch)
        at = Circumstances(
            step=batch.step,
            stage=stage,
            lr=lr,
            tokens=self.done.tokens,
            input_tokens=self._tokens_before(batch.step + 1),
            took_s=took,
            data_wait_s=wait,
            peak_memory_bytes=int(memory),
            batch_sha256=sha256,
            is_fp16=self.config.train.precision == "fp16",
        )
        record = step_record(result, at, losses, tokens, self.scheduler.names)
        record |= self.stragglers.after(batch.step, self._note)
        if self.vitals is not None:
            record |= self.vitals.read(self.scheduler.names)
        ranks_every = self.config.metrics.ranks_every
        if ranks_every and batch.step % ranks_every == 0:
            record |= of_ranks(batch.wait_s)
        for sink in sinks:
            sink.write(record)
        if self.ranks.rank == 0:
            progress.update(record)
        reach("step: recorded")
        if result.skipped and not math.isfinite(result.grad_norm):
            self._tell(progress, f"step {batch.step}: gradient not finite (loss {result.loss}); update skipped")
        journal, tell = self.scheduler.journal, self._note
        self.goes_back = check_health(self.config.recovery, self.state, batch.step, self._ways_back, journal, tell)

    def _exhausted(self, batch: Batch) -> list[str]:
        """Sources that every lane of every rank has given `max_epochs` times."""
        if not any(source.max_epochs for source in self.config.data.sources):
            return []
        going_on = exchange.largest((~batch.exhausted).astype(float).tolist())
        return [name for name, more in zip(self.scheduler.names, going_on, strict=True) if not more]

    def _global_hash(self, batch: Batch) -> str:
        """SHA-256 of the step's global batch; the same for every layout."""
        parts = exchange.gather_bytes_over_data_parallel(b"".join(batch.digests))
        ranks = [[part[at : at + 32] for at in range(0, len(part), 32)] for part in parts]
        # Sequence g of the run belongs to rank g mod dp_size. Steps before may have had fewer sequences than ranks.
        first = (self.ranks.dp_rank - int(batch.slots[0])) % len(ranks)
        return batch_sha256([digest for row in zip(*ranks[first:], *ranks[:first], strict=True) for digest in row])

    def _tokens_before(self, step: int) -> int:
        return tokens_before(self.scheduler.plan.shape, step)

    def _due(self, every: int) -> bool:
        return bool(every) and self.done.step % every == 0

    def _read_held_out(self) -> HeldOut:
        data, train, ranks = self.config.data, self.config.train, self.ranks
        count, size = train.eval_sequences, train.micro_batch_size
        # What the interleaved schedule takes; training's micro-batches are checked with the layout.
        multiple = self.layout.pipeline_parallel_size if self.layout.model_chunks > 1 else 1
        held_out = exchange.agree(
            lambda: HeldOut(data, self.scheduler.encoder, count, size, ranks.dp_rank, ranks.dp_size, multiple)
        )
        for reject in held_out.rejects:
            self._say(f"held-out data of {reject.source}: {reject.file}, record {reject.record}: {reject.reason}")
        return held_out

    def _evaluate(self, sinks: Sequence[Sink], progress: Progress) -> None:
        self.watchdog.beat(f"evaluation after {self.done.step} steps")
        losses = self.held_out.losses(self.state)
        if losses:
            self.scheduler.validated(losses)
            record: Record = {"step": self.done.step, "val_loss": losses}
            for sink in sinks:
                sink.write(record)
            if self.ranks.rank == 0:
                progress.evaluated(record)

    # -- saving and resuming -------------------------------------------------------------------------------------

    def _save(self, *, behind: bool = False) -> None:
        self.watchdog.beat(f"checkpoint of step {self.done.step}")
        self.saves.save(self.state, self.scheduler, self.done, behind=behind)

    def _ways_back(self) -> WaysBack:
        return self.saves.ways_back(self.scheduler, self.second)

    def _resume(self) -> bool:
        """Load the newest checkpoint, if there is one."""
        latest = newest_whole(
            self.checkpoints, self.ranks, self._say, self.second, self.config.checkpoint.verify, self.watchdog.beat
        )
        if latest is None:
            exchange.only_first_rank(lambda: Snapshots(self.run_dir).drop_after(0), self.ranks.rank)
            return False
        self.watchdog.beat(f"loading {latest}")
        self.done, data_state = exchange.agree(lambda: checkpoint.load(latest, self.state))
        exchange.only_first_rank(lambda: Snapshots(self.run_dir).drop_after(self.done.step), self.ranks.rank)
        if data_state is None:  # weights from elsewhere: the run itself has not begun
            self._say(f"starting {self.run_dir} from the weights of {latest}")
            return False
        self.scheduler.load_state_dict(data_state)
        self.saves.saved_at = self.done.step
        self.saves.copies.send(latest)  # in case the run ended before that was done
        reach("run: resumed")
        self._say(f"resuming {self.run_dir} at step {self.done.step} from {latest}")
        return True

    # -- the run folder ------------------------------------------------------------------------------------------

    def _open_folder(self) -> None:
        (self.run_dir / "log").mkdir(parents=True, exist_ok=True)
        if self.second is not None:
            restore_journal(self.second, self.run_dir, self.config.run.model_dump(), self._say)
        latest = self.checkpoints.latest()
        if latest is None or (self.run_dir / "journal.jsonl").exists():
            return
        if not checkpoint.read_meta(latest).get("weights_only", False):
            raise CheckpointError(
                f"{self.run_dir}: has checkpoints but no journal.jsonl; restore the file from a copy, or start a new "
                "run folder: the order of the data cannot be known without it"
            )

    def _write_config(self) -> None:
        """Only once the configuration has been accepted: a refused one must not replace that of the run."""
        (self.run_dir / "config.yaml").write_text(dump_config(self.config), encoding="utf-8")

    def _open_scheduler(self) -> Scheduler:
        journal = Journal(self.run_dir / "journal.jsonl", writable=self.ranks.rank == 0)
        ranks = self.ranks
        return Scheduler(
            self.config.data,
            dp_rank=ranks.dp_rank,
            dp_size=ranks.dp_size,
            journal=journal,
            watch=False,
            hashing=True,
            run_steps=self.config.train.steps,
        )

    def _open_sinks(self) -> list[Sink]:
        if self.ranks.rank:
            return []
        sinks = open_sinks(self.config.metrics, self.run_dir, self.config.run.name, self.done.step)
        return sinks if self.alerts is None else [*sinks, self.alerts.sink(self.scheduler.journal)]

    def _record_rejects(self, batch: Batch) -> None:
        """Write newly met rejects of all ranks to `rejects.jsonl` and count them in the journal."""
        every = [RejectedRecord(*reject) for found in process_groups.gather_objects(batch.rejects) for reject in found]
        if self.ranks.rank:
            return
        counts = self.rejects.add(every)
        if counts:
            self.scheduler.journal.append("reject", batch.step, {"records": counts}, "system")

    def _dashboard(self) -> AbstractContextManager[None]:
        return beside_run(self.config.monitor, self.run_dir, self._say) if self.ranks.rank == 0 else nullcontext()

    def _shows_progress(self) -> bool:
        return self.config.metrics.progress and self.ranks.rank == 0

    def _ask_to_stop(self) -> None:
        self.stop_asked = True

    def _tell(self, progress: Progress, text: str) -> None:
        if self.ranks.rank == 0:
            progress.note(text)

    def _note(self, text: str) -> None:
        if self.progress is None:
            self._say(text)
        else:
            self._tell(self.progress, text)

    def _say(self, text: str) -> None:
        if self.ranks.rank == 0:
            sys.stderr.write(text + "\n")
