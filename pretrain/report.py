"""What a run did, from its folder alone: a summary and a plot. Works while the run still trains.

    data = load_run("runs/quickstart")
    summary = summarise(data)              # plain numbers, also as JSON
    plot(data, "runs/quickstart/report.png")

Smoothing: a line is the local linear fit of the training records under a triangular window 1/12 of the run wide. (A
running mean lags: it draws a falling loss too high, above its validation points; and the mean of a window that shrinks
towards the end follows the last record's noise.) The records themselves stand behind the lines, pale. Validation points
are not smoothed.
"""

import itertools
import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.errors import ConfigError
from pretrain.metrics import Record, read_records
from pretrain.metrics.jsonl import plain
from pretrain.metrics.registry import has_scores, is_evaluation
from pretrain.picture import COLOURS, LINE_STYLES, picture

Floats = npt.NDArray[np.float64]

WINDOWS = 12
"""Widths of the smoothing window in a run."""
DRAWN_POINTS = 4000
"""Points of a line at most, each the mean of some records; a plot is 1,500 pixels wide."""
MOST_TURNS = 20
"""Changes of the batch shape that are marked in a plot; more would be a pattern of their own."""
LAST_STEPS = 20
"""Training records that the "last" loss is the mean of."""


@dataclass
class RunData:
    """The records of a run, in order."""

    folder: Path
    training: list[Record]
    evaluations: list[Record]
    scores: list[Record]
    """Scores of tasks."""
    journal: list[dict[str, Any]]
    """Events of `journal.jsonl`; empty without one."""

    @property
    def sources(self) -> list[str]:
        """Every source that has a loss, in order of appearance."""
        found: dict[str, None] = {}
        for record in self.training:
            found |= dict.fromkeys(record.get("source_loss", {}))
        for record in self.evaluations:
            found |= dict.fromkeys(record["val_loss"])
        return list(found)


@dataclass(frozen=True)
class SourceSummary:
    """One source's part in the run."""

    name: str
    tokens: int
    """Target tokens trained on, of the records in the file."""
    share: float
    """Of all tokens."""
    last_loss: float | None
    """Mean training loss of the source's last records."""
    first_val_loss: float | None
    last_val_loss: float | None
    last_val_bits_per_byte: float | None
    """Of the last evaluation."""
    fall: float | None
    """How much of the first validation loss is gone at the last: 0.4 means 40 % lower."""


@dataclass(frozen=True)
class Summary:
    """A run in numbers. Losses in nats per token."""

    run: str
    steps: int
    """Optimizer steps done."""
    tokens: int
    """Target tokens trained on."""
    training_s: float
    """Time inside training steps: no start-up, evaluation or saving."""
    tokens_per_s: float
    """Tokens of those steps over their time."""
    data_wait: float
    """Share of that time spent waiting for data."""
    first_loss: float
    last_loss: float
    """Mean of the last 20 steps."""
    sources: list[SourceSummary]
    scores: dict[str, dict[str, float]]
    """Of each `task/metric` its values by step of the checkpoint, ascending."""
    checkpoint: str | None
    """Newest complete checkpoint."""
    finished: bool
    """The journal says that the run reached its last step."""

    def to_json(self) -> str:
        """The summary as a JSON object; numbers that are not finite stand as in `metrics.jsonl`, "NaN"."""
        return json.dumps(plain(asdict(self)), indent=2, ensure_ascii=False, allow_nan=False)


def load_run(folder: str | Path) -> RunData:
    """Read a run folder; raises ConfigError when it is none, or has no training record yet."""
    folder = Path(folder)
    metrics = folder / "metrics.jsonl"
    if not folder.is_dir():
        raise ConfigError(f"no such run: {folder} is not a folder")
    if not metrics.exists():
        raise ConfigError(f"{folder} is not a run folder: it has no metrics.jsonl")
    records = list(read_records(metrics))
    training = [record for record in records if not is_evaluation(record) and not has_scores(record)]
    if not training:
        raise ConfigError(f"{metrics} has no training record yet; wait for the first step or look in {folder / 'log'}")
    evaluations = [record for record in records if is_evaluation(record)]
    scores = [record for record in records if has_scores(record)]
    return RunData(folder, training, evaluations, scores, _read_journal(folder / "journal.jsonl"))


def summarise(run: RunData) -> Summary:
    """The numbers of a run."""
    tokens = {name: sum(r.get("source_tokens", {}).get(name, 0) for r in run.training) for name in run.sources}
    seconds = sum(_step_s(record) for record in run.training)
    recorded = sum(sum(record.get("source_tokens", {}).values()) for record in run.training)
    total = sum(tokens.values())
    losses = series(run, None)
    sources = []
    for name in run.sources:
        values = [record["val_loss"][name] for record in run.evaluations if name in record["val_loss"]]
        first, last = (values[0], values[-1]) if values else (None, None)
        per_byte = [found[name] for r in run.evaluations if name in (found := r.get("val_bits_per_byte", {}))]
        own = series(run, name)
        sources.append(
            SourceSummary(
                name=name,
                tokens=tokens[name],
                share=tokens[name] / total if total else 0.0,
                last_loss=_mean(own[np.isfinite(own)][-LAST_STEPS:]),
                first_val_loss=first,
                last_val_loss=last,
                last_val_bits_per_byte=per_byte[-1] if per_byte else None,
                fall=1 - last / first if first and last is not None and len(values) > 1 else None,
            )
        )
    kinds = [event["kind"] for event in run.journal if event["kind"] in ("run_started", "resumed", "run_finished")]
    return Summary(
        run=str(run.folder),
        steps=run.training[-1]["step"] + 1,
        tokens=run.training[-1]["tokens"],
        training_s=seconds,
        tokens_per_s=recorded / seconds if seconds else 0.0,
        data_wait=min(1.0, sum(record["data_wait_s"] for record in run.training) / seconds) if seconds else 0.0,
        first_loss=float(losses[0]),
        last_loss=float(np.mean(losses[-LAST_STEPS:])),
        sources=sources,
        scores=_scores(run),
        checkpoint=_newest_checkpoint(run.folder),
        finished=kinds[-1:] == ["run_finished"],
    )


def _scores(run: RunData) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for record in sorted(run.scores, key=lambda record: int(record["step"])):  # of one step the last that was asked
        for name, value in record["eval"].items():
            found.setdefault(name, {})[str(record["step"])] = value
    return found


def series(run: RunData, source: str | None) -> Floats:
    """float64[records]: total training loss, or a source's with NaN where the step had none of it."""
    if source is None:
        return np.array([record["loss"] for record in run.training], dtype=np.float64)
    return np.array([record.get("source_loss", {}).get(source, math.nan) for record in run.training], dtype=np.float64)


def shape_turns(run: RunData) -> list[int]:
    """Steps from which on sequence length or batch size were others."""
    shapes = [(record["step"], record.get("seq_len"), record.get("global_batch_size")) for record in run.training]
    return [after[0] for before, after in itertools.pairwise(shapes) if before[1:] != after[1:]]


def smooth(values: Floats, reach: int) -> Floats:
    """Local linear fit of `values` (evenly spaced, all finite) with triangular weights `reach` values either way."""
    distance = np.arange(-reach, reach + 1, dtype=np.float64)
    weight = reach + 1 - np.abs(distance)

    def sums(of: Floats, power: int) -> Floats:
        """For each place the sum over its window of weight · distance^power · of, nothing beyond the ends."""
        kernel = (weight * distance**power)[::-1]
        return np.convolve(of, kernel)[reach : reach + len(of)]

    ones = np.ones(len(values))
    w, wd, wdd = sums(ones, 0), sums(ones, 1), sums(ones, 2)
    y, yd = sums(values, 0), sums(values, 1)
    spread = w * wdd - wd * wd
    straight = spread > 0  # not so where a window holds one value only
    return np.where(straight, (wdd * y - wd * yd) / np.where(straight, spread, 1.0), y / w)


def thin(values: Floats, most: int) -> Floats:
    """At most `most` values: means of as many neighbours as that takes (the last ones of fewer)."""
    size = -(-len(values) // most)
    starts = np.arange(0, len(values), size)
    return np.add.reduceat(values, starts) / np.diff(np.append(starts, len(values))) if size > 1 else values


def plot(run: RunData, path: str | Path) -> None:
    """Draw total and per-source loss over steps into the PNG `path`. Raises ConfigError without matplotlib."""
    with picture(path, figsize=(10, 5.6), dpi=150) as figure:
        _draw(run, figure.subplots())


def _draw(run: RunData, axes: Any) -> None:
    steps = np.array([record["step"] for record in run.training], dtype=np.int64)

    def lines(values: Floats, line: str, colour: str, width: float, label: str) -> None:
        finite = np.isfinite(values)
        if not finite.any():
            return
        x, y = thin(steps[finite].astype(np.float64), DRAWN_POINTS), thin(values[finite], DRAWN_POINTS)
        axes.plot(x, y, color=colour, alpha=0.2, linewidth=0.8)
        axes.plot(x, smooth(y, len(y) // (2 * WINDOWS)), line, color=colour, linewidth=width, label=label)

    total = series(run, None)
    lines(total, "-", "black", 2.2, "all sources")
    for number, source in enumerate(run.sources):
        colour = COLOURS[number % len(COLOURS)]
        lines(series(run, source), LINE_STYLES[number // len(COLOURS) % len(LINE_STYLES)], colour, 1.6, source)
        points = [(r["step"], r["val_loss"][source]) for r in run.evaluations if source in r["val_loss"]]
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, "o", color=colour, markersize=6, markeredgecolor="white", markeredgewidth=1.0, zorder=5)
    broken = steps[~np.isfinite(total)]
    if len(broken):
        where = axes.get_xaxis_transform()
        axes.plot(broken, np.full(len(broken), 0.985), "x", color="#b00020", transform=where, label="loss not finite")
    turns = shape_turns(run)
    for step in turns if len(turns) <= MOST_TURNS else ():
        axes.axvline(step, color="#999999", linewidth=0.8, linestyle=":", zorder=0)
    if run.evaluations:
        axes.plot([], [], "o", color="#777777", markeredgecolor="white", markersize=6, label="validation")
    summary = summarise(run)
    axes.set_title(
        f"{run.folder.resolve().name}   {summary.steps:,} steps, {_count(summary.tokens)} tokens", loc="left", pad=10
    )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.margins(x=0.015)
    axes.legend(frameon=False, ncols=1 + len(run.sources) // 10, loc="upper right")


def _step_s(record: Record) -> float:
    """Seconds of a step; from its speed in records without the time itself."""
    if "step_s" in record:
        return float(record["step_s"])
    speed = float(record.get("tokens_per_s", 0.0))
    return sum(record.get("source_tokens", {}).values()) / speed if speed else 0.0


def _read_journal(path: Path) -> list[dict[str, Any]]:
    """The journal's events as they stand; a report of a damaged run must not fail at its journal."""
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "kind" in event:
            events.append(event)
    return events


def _newest_checkpoint(folder: Path) -> str | None:
    found = [path for path in (folder / "checkpoints").glob("*") if re.search(r"\d$", path.name) and path.is_dir()]
    newest = max(found, key=lambda path: int(re.findall(r"\d+", path.name)[-1]), default=None)
    return None if newest is None else str(newest.relative_to(folder))


def _mean(values: Floats) -> float | None:
    return float(values.mean()) if len(values) else None


def _count(number: int) -> str:
    for limit, unit in ((10**12, "trillion"), (10**9, "billion"), (10**6, "million")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number:,}"
