"""The tables of docs/recovery.md, from benchmarks/results/; `generate.py` puts them into the page."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def crash_matrix(result: dict[str, Any]) -> Table:
    """A row for each failure that a test brought about."""
    return ("failure", "what happened"), [(case["failure"], case["outcome"]) for case in result["cases"]]


def times_back(result: dict[str, Any]) -> Table:
    """A row for each run that was killed: the parts of the time until its first new step."""
    parts = ("noticed", "pause", "import", "resumed", "step", "in_all")
    head = (
        "steps done before",
        "noticed, s",
        "launcher's pause, s",
        "import, s",
        "state and data, s",
        "step, s",
        "in all, s",
    )
    return head, [
        (f"{row['steps_before']}", *(f"{row[f'{part}_s']:.1f}" for part in parts)) for row in result["time_back"]
    ]


def saves(result: dict[str, Any]) -> str:
    """What checkpoints cost, in one sentence."""
    found = result["saves"]
    behind, at_once = (
        sorted(found["stall_s"][name])[len(found["stall_s"][name]) // 2] for name in ("behind", "at once")
    )
    kept, kept_at_once = found["behind_over_none"], found["at_once_over_none"]
    return (
        f"With a save every 20 steps of the quickstart a run keeps {kept:.2f} of its tokens per second "
        f"({kept_at_once:.2f} with `checkpoint.behind: false`); a save holds a step up for {behind * 1000:.0f} ms "
        f"({at_once * 1000:.0f} ms)."
    )


def loss_guard(result: dict[str, Any]) -> str:
    """What all runs say together, in one sentence."""
    found, settings = result["summary"], result["settings"]
    return (
        f"Precision {found['precision']:.2f}, recall {found['recall']:.2f}, cause named rightly in "
        f"{found['attribution']:.2f} of what was found; {found['false_alarms']} false alarms in "
        f"{found['steps_judged']} steps. A step has {settings['tokens_per_step']} tokens, a checkpoint comes every "
        f"{settings['checkpoint_every']} steps."
    )


def loss_guard_kinds(result: dict[str, Any]) -> Table:
    """A row for each thing that was done to runs."""
    head = (
        "what was done",
        "runs",
        "found",
        "cause right",
        "false alarms",
        "reached their end",
        "tokens lost, median",
        "most",
    )
    keys = ("runs", "found", "attributed", "false_alarms", "ended", "tokens_lost_median", "tokens_lost_most")
    kinds = result["summary"]["by_kind"]
    return head, [(kind, *(f"{row[key]:,.0f}" for key in keys)) for kind, row in kinds.items()]


def parts(
    results: Path, table: Callable[..., str], facts: Callable[[dict[str, Any]], str]
) -> Iterator[tuple[str, str]]:
    """(marker, what belongs there) for each part of the page; what no machine has measured says so.

    `results`: folder of result files; `table` and `facts` write Markdown.
    """
    for name in ("crash_matrix", "loss_guard", "recovery"):
        path = results / f"{name}.json"
        if not path.exists():
            yield name, f"`python benchmarks/{name}.py` writes the result that belongs here.\n"
            continue
        result = json.loads(path.read_text())
        if name == "crash_matrix":
            body = table(*crash_matrix(result))
        elif name == "loss_guard":
            body = f"{loss_guard(result)}\n\n{table(*loss_guard_kinds(result))}"
        else:
            body = f"{saves(result)}\n\n{table(*times_back(result))}"
        yield name, f"{body}\n{facts(result)}"
