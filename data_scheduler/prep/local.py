"""Passes in worker processes on this machine, with a bar on a terminal and plain lines elsewhere."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import multiprocess
from datatrove.executor import LocalPipelineExecutor
from datatrove.utils.logging import logger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from data_scheduler.prep.config import LocalExecutor
from data_scheduler.prep.plan import Pass
from headrace.errors import DataError, HeadraceError

POLL_S = 0.2
LINE_S = 10.0
_NOWHERE = open(os.devnull, "w")  # noqa: SIM115  (as long as the process)


def run_passes(passes: list[Pass], executor: LocalExecutor) -> None:
    """Run the passes' unfinished tasks. Raises DataError naming the log when a task fails."""
    workers = executor.workers or len(os.sched_getaffinity(0))
    # datatrove starts a pool for each pass; children that need not import everything again take nine small passes from
    # 27 s to 14.
    multiprocess.set_forkserver_preload(["data_scheduler.prep.plan"])
    # Bound now: tasks that run in this process turn sys.stderr away.
    console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
    for number, one in enumerate(passes):
        quiet = _QuietExecutor(one.pipeline, one.tasks, min(workers, one.tasks), one.logs)
        title = f"pass {number + 1}/{len(passes)} {one.name[3:]}"
        with _progress(console, title, quiet):
            try:
                quiet.run()
            except HeadraceError:
                raise
            except Exception as error:
                reason = (str(error).strip().splitlines() or [""])[0]
                raise DataError(
                    f"{title}: {type(error).__name__}: {reason}; logs of the tasks: {os.path.join(one.logs, 'logs')}"
                ) from error


class _QuietExecutor(LocalPipelineExecutor):
    """Keeps datatrove's logs and bars out of the terminal; the logs are also in its logging folder."""

    def __init__(self, pipeline: list[Any], tasks: int, workers: int, logs: str) -> None:
        super().__init__(pipeline, tasks, workers, logs)
        logger.remove()

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        try:
            with contextlib.redirect_stderr(_NOWHERE):
                return super()._run_for_rank(rank, local_rank, node_rank)
        finally:
            logger.remove()

    def done(self) -> int:
        """Tasks completed, in this or earlier runs."""
        left: list[int] = self.get_incomplete_ranks()
        return int(self.tasks) - len(left)


@contextlib.contextmanager
def _progress(console: Console, title: str, executor: _QuietExecutor) -> Iterator[None]:
    """Show a pass while it runs."""
    before = executor.done()
    note = f"{title}: {executor.tasks} task{'s' * (executor.tasks > 1)}"
    console.print(note + (f", {before} done before" if before else ""), markup=False)
    stop = threading.Event()
    live = console.is_terminal and not console.is_dumb_terminal
    columns = (TextColumn("  "), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False)
    task = bar.add_task(title, total=executor.tasks, completed=before)

    def watch() -> None:
        while not stop.wait(POLL_S if live else LINE_S):
            done = executor.done()
            if live:
                bar.update(task, completed=done)
            else:
                console.print(f"{title}: {done}/{executor.tasks}", markup=False)

    watcher = threading.Thread(target=watch, daemon=True)
    with bar if live else contextlib.nullcontext():
        watcher.start()
        try:
            yield
        finally:
            stop.set()
            watcher.join()
