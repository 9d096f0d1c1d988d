"""Passes in worker processes on this machine, with a bar on a terminal and plain lines elsewhere.

Tasks are datatrove's (`_run_for_rank`: completions, statistics, logs); the pool is not. One pool serves all passes, and
unlike datatrove's it notices a worker that was killed.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from copy import deepcopy
from typing import Any

from datatrove.executor import LocalPipelineExecutor
from datatrove.utils.logging import logger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from data_scheduler.prep.config import LocalExecutor
from data_scheduler.prep.plan import Pass
from headrace.errors import DataError, HeadraceError

LINE_S = 10.0
_NOWHERE = open(os.devnull, "w")  # noqa: SIM115  (as long as the process)


def run_passes(passes: list[Pass], executor: LocalExecutor) -> None:
    """Run the passes' unfinished tasks. Raises DataError naming the log when a task fails or a worker is killed."""
    workers = executor.workers or len(os.sched_getaffinity(0))
    # Bound now: tasks that run in this process turn sys.stderr away.
    console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
    with _pool(workers) as finished:
        for number, one in enumerate(passes):
            job = _Job(one.pipeline, one.tasks, logging_dir=one.logs)
            logger.remove()
            title = f"pass {number + 1}/{len(passes)} {one.name[3:]}"
            left: list[int] = job.get_incomplete_ranks()
            try:
                with _progress(console, title, one.tasks, one.tasks - len(left)) as advance:
                    for _ in finished(job, left):
                        advance()
            except HeadraceError:
                raise
            except BrokenProcessPool:
                raise DataError(
                    f"{title}: a worker was killed, most likely for memory; start again with fewer workers"
                ) from None
            except Exception as error:
                reason = (str(error).strip().splitlines() or [""])[0]
                logs = os.path.join(one.logs, "logs")
                raise DataError(f"{title}: {type(error).__name__}: {reason}; logs of the tasks: {logs}") from error


class _Job(LocalPipelineExecutor):
    """Keeps datatrove's logs and bars out of the terminal; the logs are also in its logging folder."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        try:
            with contextlib.redirect_stderr(_NOWHERE):
                return super()._run_for_rank(rank, local_rank, node_rank)
        finally:
            logger.remove()


def _task(job: _Job, rank: int) -> None:
    """One task, with blocks of its own."""
    job = deepcopy(job)
    job._run_for_rank(rank)


Finished = Callable[[_Job, list[int]], Iterator[None]]
"""Runs a pass's tasks and yields as they finish."""


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[Finished]:
    """The tasks' processes; one worker is this process."""
    if workers == 1:

        def one_by_one(job: _Job, ranks: list[int]) -> Iterator[None]:
            for rank in ranks:
                _task(job, rank)
                yield

        yield one_by_one
        return
    context = multiprocessing.get_context("forkserver")
    # Workers begin with everything imported, which takes 2 s.
    context.set_forkserver_preload(["data_scheduler.prep.plan"])
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(workers, context, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))

    def side_by_side(job: _Job, ranks: list[int]) -> Iterator[None]:
        for task in as_completed([pool.submit(_task, job, rank) for rank in ranks]):
            yield task.result()

    try:
        yield side_by_side
    except BaseException:
        # Nobody waits for the other tasks' results; finished tasks are remembered.
        for process in multiprocessing.active_children():
            if process not in others:
                process.kill()
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


@contextlib.contextmanager
def _progress(console: Console, title: str, tasks: int, before: int) -> Iterator[Callable[[], None]]:
    """Show a pass while it runs; yields what to call when a task is finished."""
    note = f"{title}: {tasks} task{'s' * (tasks > 1)}"
    console.print(note + (f", {before} done before" if before else ""), markup=False)
    live = console.is_terminal and not console.is_dumb_terminal
    columns = (TextColumn("  "), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False)
    task = bar.add_task(title, total=tasks, completed=before)
    printed, done = time.monotonic(), before

    def advance() -> None:
        nonlocal printed, done
        done += 1
        bar.update(task, completed=done)
        if not live and time.monotonic() - printed >= LINE_S:
            printed = time.monotonic()
            console.print(f"{title}: {done}/{tasks}", markup=False)

    with bar if live else contextlib.nullcontext():
        yield advance
