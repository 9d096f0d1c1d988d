"""Trains a configuration: joins the other processes, then one `Run` (`loop.py`) for each layout that the run has.

train(load_config("recipes/quickstart.yaml"))  # every process of the run
"""

import gc
import sys
from pathlib import Path

import torch

from headrace.errors import ConfigError, ExitCode
from parallel import accelerator, exchange, process_groups
from parallel.layout import Layout
from pretrain.alerts.run import Alerts, alerting, usable_hooks
from pretrain.config import RunConfig
from pretrain.control.live import with_live_sources
from pretrain.layouts import layouts_ahead
from pretrain.loop import Run
from pretrain.models.vocabulary import padded_vocab_size
from pretrain.recovery.watchdog import Watchdog
from pretrain.run_lock import holding


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
        with holding(Path(config.run.dir), ranks.rank):
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
