"""A run from start, or from its newest checkpoint, to end: data, steps, evaluation, checkpoints, metrics.

The run folder holds all there is:

    config.yaml  journal.jsonl  metrics.jsonl  rejects.jsonl  checkpoints/  control/  data_state/  log/
"""

import math
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from data_scheduler.batch import Batch, RejectedRecord
from data_scheduler.config import SourceConfig
from data_scheduler.stages import tokens_before
from data_scheduler.state import Snapshots
from headrace.errors import ExitCode
from parallel import accelerator, exchange, process_groups
from parallel.layout import Layout
from pretrain import checkpoint
from pretrain.alerts.run import Alerts
from pretrain.config import RunConfig
from pretrain.control.desk import Stand
from pretrain.control.live import Live, setting
from pretrain.evaluate import read_held_out
from pretrain.layouts import layout_from
from pretrain.learning_rate import learning_rate
from pretrain.metrics import Record, Sink, open_sinks
from pretrain.metrics.sink import closing
from pretrain.metrics.vitals import Vitals, of_ranks
from pretrain.microbatch import split_batch
from pretrain.models.vocabulary import check_vocabulary, padded_vocab_size
from pretrain.monitor.serve import beside_run
from pretrain.progress import Progress
from pretrain.recovery.fault_points import reach
from pretrain.recovery.fetching import open_second_place
from pretrain.recovery.health import check_health, new_guard
from pretrain.recovery.newest import newest_whole
from pretrain.recovery.rollback import WaysBack
from pretrain.recovery.stragglers import Stragglers
from pretrain.recovery.watchdog import Watchdog
from pretrain.rejects import Rejects
from pretrain.run_folder import open_folder, open_scheduler, write_config
from pretrain.saves import Saves
from pretrain.selection.selection import open_selection
from pretrain.stages import parallel_of, settings_of
from pretrain.step import TrainState, build_state, train_step
from pretrain.step_record import Circumstances, by_source, step_record
from pretrain.stop_signals import stopping_on_signals
from pretrain.utilisation import Utilisation
from pretrain.whole_batch import exhausted_everywhere, global_hash


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
        exchange.only_first_rank(lambda: open_folder(config, self.second, self._say), ranks.rank)
        self.scheduler = exchange.first_rank_first(lambda: open_scheduler(config, ranks), ranks.rank)
        # Sources with bands have become these.
        own = {"sources": self.scheduler.config.sources, "stages": self.scheduler.config.stages}
        data = config.data.model_copy(update=own)
        self.config = config = config.model_copy(update={"data": data})
        tokens = self.scheduler.encoder.vocab_size
        vocab_size = padded_vocab_size(config, tokens)
        check_vocabulary(vocab_size, tokens)
        self.held_out = read_held_out(self.config, self.layout, self.ranks, self.scheduler.encoder, self._say)
        # Not before: reading the data for the first time may take hours.
        watchdog.more["data loader"] = lambda: f"next step {self.scheduler.next_step}, {self.scheduler.names}"
        watchdog.beat("building the model")
        self.state: TrainState = build_state(config, layout, ranks, vocab_size)
        self.state.beat = watchdog.beat
        self.utilisation = Utilisation(self.config, vocab_size, ranks.world_size)
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
        exchange.only_first_rank(lambda: write_config(self.config), self.ranks.rank)
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
        self.watchdog.rest()  # reading it for the first time may take hours
        self.scheduler = exchange.agree(lambda: self.scheduler.with_source(source))
        data = self.config.data.model_copy(update={"sources": [*self.config.data.sources, source]})
        self.config = self.config.model_copy(update={"data": data})
        self.state.config, self.state.num_sources = self.config, len(data.sources)
        self.held_out = read_held_out(self.config, self.layout, self.ranks, self.scheduler.encoder, self._say)
        exchange.only_first_rank(lambda: write_config(self.config), self.ranks.rank)

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
        self.scheduler.feedback(
            batch.step, losses, tokens, exhausted_everywhere(self.config.data, batch, self.scheduler.names)
        )
        if self.scheduler.is_time_to_look:
            self.scheduler.grow(exchange.from_first_rank(self.scheduler.new_files, self.ranks.rank))
        self.done = checkpoint.Progress(batch.step + 1, self.done.tokens + sum(tokens.values()))
        sha256 = global_hash(batch, self.ranks.dp_rank)
        took = time.perf_counter() - began
        memory = accelerator.max_memory_allocated()
        wait, passes_s, update_s, rejects, memory = exchange.largest(
            [batch.wait_s, result.passes_s, result.update_s, len(batch.rejects), memory]
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
            passes_s=passes_s,
            update_s=update_s,
            peak_memory_bytes=int(memory),
            batch_sha256=sha256,
            is_fp16=self.config.train.precision == "fp16",
        )
        record = step_record(result, at, losses, tokens, self.scheduler.names)
        if self.selection is None:  # which leaves out some of the operations
            record |= self.utilisation.of_step(stage.seq_len, stage.seq_len * stage.global_batch_size, took)
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

    def _tokens_before(self, step: int) -> int:
        return tokens_before(self.scheduler.plan.shape, step)

    def _due(self, every: int) -> bool:
        return bool(every) and self.done.step % every == 0

    def _evaluate(self, sinks: Sequence[Sink], progress: Progress) -> None:
        self.watchdog.beat(f"evaluation after {self.done.step} steps")
        losses = self.held_out.losses(self.state)
        if losses:
            self.scheduler.validated(losses)
            per_byte = self.held_out.bits_per_byte(losses)
            record: Record = {"step": self.done.step, "val_loss": losses, "val_bits_per_byte": per_byte}
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

    def _open_sinks(self) -> list[Sink]:
        if self.ranks.rank:
            return []
        from_checkpoint = self.checkpoints.latest() is not None
        sinks = open_sinks(self.config.metrics, self.run_dir, self.config.run.name, self.done.step, from_checkpoint)
        return sinks if self.alerts is None else [*sinks, self.alerts.sink(self.scheduler.journal)]

    def _record_rejects(self, batch: Batch) -> None:
        """Write newly met rejects of all ranks to `rejects.jsonl` and count them in the journal."""
        every = process_groups.gather_objects(batch.rejects)
        if self.ranks.rank == 0 and (counts := self.rejects.add(RejectedRecord(*one) for of in every for one in of)):
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
