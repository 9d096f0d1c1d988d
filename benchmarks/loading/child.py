"""One measured process: `python -m loading.child '<spec as JSON>'`, the result as JSON on the last line it prints.

An arm is a function (spec, split, kept) → iterator of tokens delivered per batch. It is called twice: on the warm
split, so that code, allocator and the tokenizer's caches are warm, with other documents than those measured; then on
the main split, read from its first byte on. `kept` is a dict for what a user would make once, such as a tokenizer.

CPU seconds are user + system, of all threads and of child processes, from before the first batch is asked for until
the last of the wanted tokens is there. Making the loader is counted apart (`setup_cpu_s`).
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

Spec = dict[str, Any]
Arm = Callable[[Spec, str, dict[str, Any]], Iterator[int]]


def cpu_seconds() -> float:
    """User + system seconds of this process, its threads, and its children, running or waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in used) + _running_children()


def _running_children() -> float:
    ticks, total, pending = os.sysconf("SC_CLK_TCK"), 0.0, [os.getpid()]
    while pending:
        pid = pending.pop()
        try:
            for task in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{task}/children") as file:
                    pending += map(int, file.read().split())
            if pid != os.getpid():
                with open(f"/proc/{pid}/stat") as file:
                    fields = file.read().rpartition(")")[2].split()
                total += sum(map(int, fields[11:15])) / ticks
        except OSError:  # ended while we looked: it is in RUSAGE_CHILDREN by now
            continue
    return total


def measure(arm: Arm, spec: Spec) -> dict[str, Any]:
    """Run the arm on both splits; the figures of the second."""
    kept: dict[str, Any] = {}
    _consume(arm(spec, "warm", kept), spec["warm_tokens"])
    kept.pop("report", None)
    before = cpu_seconds()
    batches = arm(spec, "main", kept)
    began, wall = cpu_seconds(), time.perf_counter()
    tokens, steps = _consume(batches, spec["tokens"])
    used, wall = cpu_seconds() - began, time.perf_counter() - wall
    result = {
        "tokens": tokens,
        "batches": steps,
        "cpu_s": round(used, 4),
        "wall_s": round(wall, 4),
        "setup_cpu_s": round(began - before, 4),
        "tokens_per_cpu_s": round(tokens / used),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    return result | kept.get("report", dict)()


def _consume(batches: Iterator[int], wanted: int) -> tuple[int, int]:
    tokens = steps = 0
    for count in batches:
        tokens += count
        steps += 1
        if tokens >= wanted:
            break
    return tokens, steps


def main() -> None:
    spec = json.loads(sys.argv[1])
    if spec["core"] is not None:
        os.sched_setaffinity(0, {spec["core"]})
    module, _, name = spec["arm"].partition(":")
    try:
        result = measure(import_module(f"loading.{module}").ARMS[name], spec)
    except Exception as error:  # Said in the result file: an arm is never left out silently.
        result = {"not_run": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    print("\n" + json.dumps(result), flush=True)
    # Some libraries' threads never end; everything is said.
    os._exit(0)


if __name__ == "__main__":
    main()
