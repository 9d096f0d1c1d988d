"""Which nodes of an allocation a run uses, by what their checks said. Standard library only, as `attempts.py`.

choose_nodes({"a": "mixed", "b": "mixed", "c": "down*"}, checks, counts=[2], limits)   # use a and b; c is bad
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

UNUSABLE = ("down", "fail", "drain", "boot", "power", "*")
"""Parts of SLURM's words for nodes on which nothing should be started; the star means that a node does not answer."""


@dataclass(frozen=True)
class Choice:
    """The nodes to use, and the others that something is wrong with."""

    use: list[str]
    """Empty when too few are left."""
    bad: dict[str, str]
    """Why, by node."""


def choose_nodes(
    states: Mapping[str, str],
    checks: Mapping[str, Mapping[str, Any]] | None,
    counts: Sequence[int],
    limits: Mapping[str, Any],
) -> Choice:
    """As many good nodes as the largest of `counts` (numbers of nodes for which the run's layout works) that there are.

    `states`: SLURM's word for each node; `checks`: what each node said of itself, None when nobody asked. The first
    nodes are taken, so that the order of ranks is that of the allocation.
    """
    bad = {node: f"SLURM says {state}" for node, state in states.items() if not is_usable(state)}
    if checks is not None:
        for node in states:
            if node not in bad and (why := _wrong(node, checks, limits)):
                bad[node] = why
    good = [node for node in states if node not in bad]
    count = max((number for number in counts if number <= len(good)), default=0)
    return Choice(good[:count], bad)


def is_usable(state: str) -> bool:
    """Whether something can be started on a node of which SLURM says this."""
    return not any(part in state.lower() for part in UNUSABLE)


def fault_of_the_run(checks: Mapping[str, Mapping[str, Any]], earlier: Mapping[str, str]) -> str:
    """A problem with a path that is no single node's: another node has it too, now or (`earlier`: why nodes were bad)
    before; empty without one. A mistyped path would otherwise have every node of the cluster excluded in turn."""
    for node, check in checks.items():
        for problem in check.get("paths", []):
            others = [other for other in checks if other != node and problem in checks[other].get("paths", [])]
            before = [other for other, why in earlier.items() if other != node and problem in why.split("; ")]
            if others or before:
                return f"{problem} (on {node} and {', '.join([*others, *before])})"
    return ""


def _wrong(node: str, checks: Mapping[str, Mapping[str, Any]], limits: Mapping[str, Any]) -> str:
    """What is wrong with a node; empty when nothing is."""
    found = checks.get(node)
    if found is None:
        return "its check gave no answer"
    if found["problems"]:
        return "; ".join(found["problems"])
    # Of three clocks the odd one is known; of two, the later one is taken to be right.
    clock = statistics.median_high([check["time"] for check in checks.values()])
    skew, most = found["time"] - clock, limits["max_clock_skew_s"]
    if abs(skew) > most:
        return f"its clock is {skew:+.1f} s off the other nodes' (at most {most:g})"
    rates = found.get("allreduce_gb_per_s", [])
    if rates and max(rates) < limits["min_allreduce_gb_per_s"]:
        return f"all-reduce at {max(rates):.3g} GB/s (at least {limits['min_allreduce_gb_per_s']:g})"
    return ""


def read_checks(folder: Path) -> dict[str, dict[str, Any]] | None:
    """What the nodes wrote, by node; None when there is no such folder: they were not asked."""
    if not folder.is_dir():
        return None
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            check = json.loads(path.read_text())
        except ValueError:
            continue  # cut short: no answer
        found[check["node"]] = {**found.get(check["node"], {}), **check}
    return found
