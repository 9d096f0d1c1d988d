"""What the pages show, as plain data: each function answers one address of `app.py` from a run's folder."""

from collections import Counter
from typing import Any, Final

import numpy as np
import orjson

from pretrain.metrics.registry import METRICS
from pretrain.monitor.downsample import Floats, bucket_means, downsample, not_finite, smooth
from pretrain.monitor.journal_tail import shown
from pretrain.monitor.metrics_index import Columns, Series
from pretrain.monitor.run_files import read_plain, readable
from pretrain.monitor.run_folder import MOST_STEPS, RunFolder

BY_LAYER: Final = frozenset(metric.name for metric in METRICS if metric.label == "layer")
SPARK_POINTS: Final = 60
MOST_EVENTS: Final = 1000
"""Events of the journal in one answer, the newest."""
MOST_REJECT_BYTES: Final = 8 << 20
"""The end of `rejects.jsonl` that is counted."""
QUIET_KINDS: Final = ("mixture", "proposed", "policy_input", "manifest", "reject")
"""Events that a policy or the loader may journal at every step; the page asks for them by name."""


def listed(run: RunFolder) -> dict[str, Any]:
    """A row of the list of runs."""
    if run.spark[0] != run.version:
        x, y = _points(_shown(run, "train"), "loss", "step")
        drawn = downsample(x, y, SPARK_POINTS // 2)[1]
        run.spark = (run.version, [round(value, 4) for value in drawn.tolist()])
    return run.summary() | {"spark": run.spark[1]}


def detail(run: RunFolder) -> dict[str, Any]:
    """A run, the names of its series, and its sources."""
    train, val = _shown(run, "train"), _shown(run, "val")
    names = [*train.values, *val.values]
    sources = {name.partition("/")[2]: None for name in names if name.startswith(("source_", "val_loss/"))}
    configured = run.setting("data", "sources")
    for source in configured if isinstance(configured, list) else []:
        if isinstance(source, dict) and isinstance(source.get("name"), str):
            sources.setdefault(readable(source["name"]), None)
    layers: dict[str, list[str]] = {}
    for name in train.values:
        metric, slash, layer = name.partition("/")
        if slash and metric in BY_LAYER:
            layers.setdefault(metric, []).append(layer)
    summary = run.summary()
    done = summary["step"]
    every = _inner(run.setting("metrics", "dynamics"), "every")
    return (
        summary
        | {
            "series": names,
            "sources": list(sources),
            "layers": {metric: sorted(found, key=_layer_order) for metric, found in layers.items()},
            "mixture": run.journal.asked(done),
            "dynamics_every": every if type(every) is int and 0 < every < MOST_STEPS else 0,
        }
        | run.journal.decided(done)
    )


def series(
    run: RunFolder, names: list[str], axis: str, begin: float, end: float, width: int, window: int
) -> dict[str, Any]:
    """Points of each of the named series between `begin` and `end` on the axis (`step`, `tokens`), at most two a pixel;
    smoothed over `window` records where it is more than one."""
    found = {}
    train, val = _shown(run, "train"), _shown(run, "val")
    for name in names:
        table = val if name.startswith(("val_", "eval/")) else train
        x, y = _points(table, name, axis, train)
        if not len(x):
            continue
        smoothed = smooth(y, window) if table is train else y
        # One point more on each side, so that lines go on to the edges.
        first, last = max(0, int(np.searchsorted(x, begin)) - 1), int(np.searchsorted(x, end, side="right")) + 1
        shown_x, shown_y = downsample(x[first:last], smoothed[first:last], width)
        found[name] = {"x": shown_x.tolist(), "y": shown_y.tolist(), "not_finite": not_finite(x, y)}
    return {"version": run.version, "indexed": run.indexed, "series": found}


def events(run: RunFolder, after: int, kinds: list[str]) -> dict[str, Any]:
    """The newest events of the journal with a number above `after`, without those that come at every step unless their
    kind is asked for; what people decided always."""
    wanted = [
        event
        for event in run.journal.events[max(0, after + 1) :]
        if event.by.startswith("user:") or (event.kind in kinds if kinds else event.kind not in QUIET_KINDS)
    ]
    undone = [event.data.get("event") for event in run.journal.events if event.kind == "undone"]
    tokens = _tokens_of_steps(run)
    return {
        "events": [shown(event) | {"tokens": tokens(event.step)} for event in wanted[-MOST_EVENTS:]],
        "left_out": max(0, len(wanted) - MOST_EVENTS),
        "undone": sorted({number for number in undone if type(number) is int}),
        "damage": run.journal.damage,
    }


def mixture(run: RunFolder, width: int) -> dict[str, Any]:
    """Shares asked for and realised over tokens, in `width` buckets: float[width] per source."""
    train = _shown(run, "train")
    tokens, steps = train.tokens.astype(np.float64), train.step
    names = [name.partition("/")[2] for name in train.values if name.startswith("source_tokens/")]
    if not len(steps) or not names:
        return {"x": [], "step": [], "asked": {}, "realised": {}, "tokens": {}}
    edges = np.linspace(tokens[0] - 1, tokens[-1], min(width, len(tokens)) + 1)
    where = np.clip(np.searchsorted(edges, tokens, side="left") - 1, 0, len(edges) - 2)
    given = {}
    for name in names:
        found = train.series(f"source_tokens/{name}")
        if found is not None:
            given[name] = np.bincount(where[found.rows], weights=found.values, minlength=len(edges) - 1)
    total = np.sum(list(given.values()), axis=0)
    full = total > 0
    steps_of = steps[np.minimum(np.searchsorted(tokens, edges[1:][full]), len(steps) - 1)]
    asked = [run.journal.asked(int(step)) for step in steps_of.tolist()]
    every = list(dict.fromkeys([*(name for one in asked for name in one), *names]))
    none = np.zeros(len(total))
    return {
        "x": edges[1:][full].tolist(),
        "step": steps_of.tolist(),
        "asked": {name: [one.get(name, 0.0) for one in asked] for name in every},
        "realised": {name: (given.get(name, none)[full] / total[full]).tolist() for name in every},
        "tokens": {name: float(given.get(name, none).sum()) for name in every},
    }


def heat_map(run: RunFolder, metric: str, layers: list[str], axis: str, width: int) -> dict[str, Any]:
    """Mean of a metric of each layer in buckets of the axis: float[layers][width], null where nothing was measured."""
    train = _shown(run, "train")
    every = [(layer, *_points(train, f"{metric}/{layer}", axis)) for layer in layers]
    every = [(layer, x, y) for layer, x, y in every if len(x)]
    if not every:
        return {"x": [], "layers": [], "values": []}
    begin, end = min(x[0] for _, x, _ in every), max(x[-1] for _, x, _ in every)
    count = max(1, min(width, max(len(x) for _, x, _ in every)))
    edges = np.linspace(begin, end if end > begin else begin + 1, count + 1)
    return {
        "x": edges.tolist(),
        "layers": [layer for layer, _, _ in every],
        "values": [bucket_means(x, y, edges).tolist() for _, x, y in every],
    }


def rejects(run: RunFolder) -> dict[str, Any]:
    """Rejected records by source and reason, and the newest of them."""
    path = run.path / "rejects.jsonl"
    counts: Counter[tuple[str, str]] = Counter()
    newest: list[dict[str, str]] = []
    try:
        size = path.lstat().st_size
        lines = read_plain(path, MOST_REJECT_BYTES, end=True).split(b"\n")
    except OSError:
        lines, size = [], 0
    for line in lines:
        try:
            found = orjson.loads(line)
            row = {key: str(found[key])[:500] for key in ("source", "file", "record", "reason")}
        except (orjson.JSONDecodeError, KeyError, TypeError):
            continue
        counts[row["source"], row["reason"].partition(":")[0]] += 1
        newest.append(row)
    return {
        "counts": [{"source": source, "reason": reason, "count": n} for (source, reason), n in counts.most_common(100)],
        "newest": newest[-50:][::-1],
        "is_all": size <= MOST_REJECT_BYTES,
    }


def _shown(run: RunFolder, kind: str) -> Columns:
    """The records of a kind as they are now; taken once, an answer is of one moment while the run goes on."""
    return run.metrics.tables[kind].shown


def _points(table: Columns, name: str, axis: str, train: Columns | None = None) -> tuple[Floats, Floats]:
    """A series on an axis; evaluations, which have no tokens of their own, get those of the training step before."""
    found: Series | None = table.series(name)
    if found is None:
        return np.empty(0), np.empty(0)
    steps = table.step[found.rows]
    x = steps.astype(np.float64)
    if axis == "tokens":
        x = table.tokens[found.rows].astype(np.float64)
        if train is not None and table is not train:
            x = _tokens_after(train, steps)
    y = found.values.astype(np.float64)
    if len(x) > 1 and (np.diff(x) < 0).any():  # a file that was put together by hand
        order = np.argsort(x, kind="stable")
        x, y = x[order], y[order]
    return x, y


def _tokens_after(train: Columns, steps: Any) -> Floats:
    """Tokens trained on when so many steps are done."""
    done, tokens = train.step + 1, train.tokens
    if not len(done):
        return np.zeros(len(steps))
    where = np.searchsorted(done, steps, side="right") - 1
    return np.asarray(np.where(where >= 0, tokens[np.maximum(where, 0)], 0), np.float64)


def _tokens_of_steps(run: RunFolder) -> Any:
    train = _shown(run, "train")
    return lambda step: float(_tokens_after(train, np.array([step]))[0])


def _layer_order(name: str) -> tuple[int, int]:
    return (-1, 0) if name == "embedding" else (0, int(name)) if name.isdecimal() else (1, 0)


def _inner(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None
