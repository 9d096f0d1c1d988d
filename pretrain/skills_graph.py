"""The skills graph of Skill-It from finished runs, each trained on one source alone.

    A_ij = max(0, (L_j(f_0) − L_j(f_i)) / L_j(f_0))

L_j(f_0) is the held-out loss of source j before the first step, L_j(f_i) the one at the end of the run on source i:
by what part a run on i lowered the loss on j. This is the paper's approximate way (arXiv 2307.14430, section 3.2: one
run a skill, edges from how the others' losses fall), with the edges' weights as Aioli's authors state them (arXiv
2411.05735, table 1). Five sources take five short runs, not the 25 of pairs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from headrace.errors import ConfigError
from pretrain.metrics import read_records


class SingleSourceRun(NamedTuple):
    """What a run on one source shows."""

    source: str
    steps: int
    before: dict[str, float]
    """Held-out loss of every source before the first step, nats/token."""
    after: dict[str, float]
    """After the last."""


def read_run(path: Path) -> SingleSourceRun:
    """A finished run's part in the graph. `path`: run folder or metrics.jsonl.

    Raises ConfigError when it was trained on several sources, or lacks the evaluations.
    """
    file = path / "metrics.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"{path}: no metrics.jsonl there; give a run folder or such a file")
    trained: dict[str, int] = {}
    evaluations: dict[int, dict[str, float]] = {}
    for record in read_records(file):
        for name, tokens in record.get("source_tokens", {}).items():
            trained[name] = trained.get(name, 0) + int(tokens)
        if isinstance(record.get("val_loss"), dict):
            evaluations[record["step"]] = record["val_loss"]
    if len(trained) != 1:
        found = ", ".join(sorted(trained)) or "no source"
        raise ConfigError(f"{path}: trained on {found}; a graph is made of runs on one source each")
    if len(evaluations) < 2 or 0 not in evaluations:
        raise ConfigError(f"{path}: no held-out losses before the first and after the last step; set val_paths")
    last = max(evaluations)
    return SingleSourceRun(next(iter(trained)), last, evaluations[0], evaluations[last])


def estimate_graph(runs: Sequence[SingleSourceRun], threshold: float = 0.0) -> dict[str, Any]:
    """{"sources", "graph", "steps"}: the graph over the runs' sources, as `data.policy.options.graph` takes it.

    threshold: smaller weights become 0. Raises ConfigError when runs do not belong together.
    """
    sources = [run.source for run in runs]
    twice = sorted({name for name in sources if sources.count(name) > 1})
    if twice:
        raise ConfigError(f"two runs were trained on {twice[0]!r}; give one a source")
    lengths = sorted({run.steps for run in runs})
    if len(lengths) != 1:
        raise ConfigError(
            f"the runs have {', '.join(map(str, lengths))} steps; their losses compare only at equal length"
        )
    graph = []
    for run in runs:
        missing = [name for name in sources if name not in run.before or name not in run.after]
        if missing:
            raise ConfigError(f"the run on {run.source!r} has no held-out loss of {missing[0]!r}; set its val_paths")
        fallen = [(run.before[name] - run.after[name]) / run.before[name] for name in sources]
        graph.append([weight if weight >= max(threshold, 0.0) else 0.0 for weight in fallen])
    return {"sources": sources, "graph": graph, "steps": lengths[0]}
