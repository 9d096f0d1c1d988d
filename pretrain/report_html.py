"""`headrace report RUN --html FILE`: a run as one HTML file that needs nothing else, to be mailed or kept.

    write_html(load_run("runs/wonton"), Path("wonton.html"))

Plots are inline SVG; light or dark follows the reader's setting. There is no script, and the page's own policy forbids
any, and every request: names of sources and what the journal quotes come from data, and are escaped besides.
"""

import html
import itertools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pretrain.progress import clock_time, short
from pretrain.report import Floats, RunData, Summary, series, summarise
from pretrain.report_svg import Chart, Line, Points

MOST_SOURCES = 12
"""Sources that get a line, those with the most tokens; the table has them all."""
MOST_EVENTS = 200
"""The journal's newest events that the page lists."""
MOST_SCORED = 8
"""Checkpoints whose scores of tasks the page lists."""
QUIET = frozenset({"manifest", "checkpoint", "policy_input", "proposed", "capped"})
"""Kinds of event that are many and tell a reader little."""
NOISY = frozenset({"Speed", "Waiting for data", "Gradient norm"})
"""Plots whose values need smoothing; a learning rate must not have any."""
MARKED = {"resumed": "resumed", "rollback": "rollback", "anomaly": "anomaly", "stage": "stage"}
"""Kinds of event that are marked in the plot of the loss."""

_STYLE = """
:root{color-scheme:light dark;--ink:#1d232b;--dim:#5c6773;--rule:#dfe4ea;--page:#fff;--bad:#b00020;
--c0:#0072b2;--c1:#d55e00;--c2:#00805f;--c3:#b8578f;--c4:#a67600;--c5:#3b8fc4}
@media (prefers-color-scheme:dark){:root{--ink:#e6eaef;--dim:#9aa6b2;--rule:#333c46;--page:#14181d;--bad:#ff6b81;
--c0:#5ab4f0;--c1:#ff9350;--c2:#35c79f;--c3:#e59cc8;--c4:#f0bd42;--c5:#9bd3f5}}
body{margin:2rem auto;max-width:75rem;padding:0 1rem;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,sans-serif}
h1{margin:0;font-size:1.6rem;overflow-wrap:anywhere}h2{font-size:1.1rem;margin:2rem 0 .5rem}
.state{color:var(--dim);margin:0 0 1rem}.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(11rem,1fr));
gap:.8rem;margin:0}.facts div{border-top:2px solid var(--rule);padding-top:.3rem}dt{color:var(--dim);font-size:.8rem}
dd{margin:0;font-size:1.1rem;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,30rem),1fr));gap:1.5rem}
.charts figure:first-child{grid-column:1/-1}figure{margin:0}figcaption{font-weight:600}
figcaption small{font-weight:400;color:var(--dim)}svg{display:block;width:100%;height:auto;overflow:visible}
svg text{fill:var(--dim);font:11px system-ui,sans-serif}.axis{stroke:var(--rule);stroke-width:1}
.line{fill:none;stroke-width:1.8;stroke-linejoin:round}.raw{fill:none;stroke-width:.8;opacity:.25}
.mark{stroke:var(--dim);stroke-dasharray:2 3}.bad{fill:var(--bad)}
ul.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.1rem 1rem;margin:.3rem 0 0;padding:0;font-size:.85rem}
.legend svg{display:inline-block;width:1.6rem;height:.7rem;margin-right:.3rem}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:.25rem .6rem;border-bottom:1px solid var(--rule);white-space:nowrap}
th:first-child,td:first-child,td.text,th.text{text-align:left}td.text{white-space:normal;overflow-wrap:anywhere}
th{color:var(--dim);font-weight:500;font-size:.85rem}
"""


def write_html(run: RunData, path: Path) -> None:
    """Write the report of `run`; raises OSError when it cannot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page(run), encoding="utf-8", errors="replace")
    partial.replace(path)


def page(run: RunData) -> str:
    """The whole page."""
    summary = summarise(run)
    name = _text(run.folder.resolve().name)
    state = "finished" if summary.finished else "not finished"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{name}: report</title><style>{_STYLE}</style></head><body>
<h1>{name}</h1><p class="state">{state}</p>
{_facts(summary)}
<h2>Over the run</h2><div class="charts">{"".join(chart.figure() for chart in charts(run, summary))}</div>
<h2>Sources</h2>{_sources(summary)}{_scores(summary)}
<h2>What happened</h2>{_events(run)}
</body></html>
"""


def charts(run: RunData, summary: Summary) -> list[Chart]:
    """The page's plots, the loss first; one whose values no record has is left out."""
    largest = sorted(summary.sources, key=lambda source: -source.tokens)[:MOST_SOURCES]
    names = [name for name in run.sources if name in {source.name for source in largest}]
    losses = [Line("all sources", series(run, None), "ink")]
    losses += [Line(name, series(run, name), number) for number, name in enumerate(names)]
    points = []
    for number, name in enumerate(names):
        found = [(record["step"], record["val_loss"][name]) for record in run.evaluations if name in record["val_loss"]]
        points.append(Points(f"{name}, validation", found, number))
    totals = np.array([sum(record.get("source_tokens", {}).values()) for record in run.training], dtype=np.float64)
    shares = []
    for number, name in enumerate(names):
        own = np.array([record.get("source_tokens", {}).get(name, 0) for record in run.training], dtype=np.float64)
        shares.append(Line(name, 100 * own / np.where(totals > 0, totals, math.nan), number, "trend"))
    wait = 100 * _column(run, "data_wait_s") / np.where(_column(run, "step_s") > 0, _column(run, "step_s"), math.nan)
    steps = np.array([record["step"] for record in run.training], dtype=np.float64)
    made = [Chart("Loss", "nats per token; dots: validation", steps, losses, points, _marks(run), 1240)]
    made.append(Chart("Tokens by source", "% of the step's", steps, shares))
    for title, unit, values in (
        ("Speed", "tokens/s", _column(run, "tokens_per_s")),
        ("Waiting for data", "% of the step's time", wait),
        ("Gradient norm", "before clipping", _column(run, "grad_norm")),
        ("Learning rate", "", _column(run, "lr")),
        ("Largest attention logit", "of all layers", _largest(run, "max_attention_logit")),
        ("Noise scale", "tokens", _column(run, "noise_scale")),
        ("Peak memory", "GB, of the fullest rank", _column(run, "peak_memory_bytes") / 1e9),
    ):
        if np.isfinite(values).any():
            style: Literal["both", "values"] = "both" if title in NOISY else "values"
            made.append(Chart(title, unit, steps, [Line(title, values, 0, style)]))
    return made


def _column(run: RunData, name: str) -> Floats:
    return np.array([record.get(name, math.nan) for record in run.training], dtype=np.float64)


def _largest(run: RunData, name: str) -> Floats:
    return np.array([max(record.get(name, {}).values(), default=math.nan) for record in run.training], dtype=np.float64)


def _marks(run: RunData) -> list[tuple[float, str]]:
    """(step, word) of events to be marked, each step once; none where so many would hide the plot."""
    found: dict[float, str] = {}
    for event in run.journal:
        if event["kind"] in MARKED and isinstance(event.get("step"), int):
            found.setdefault(event["step"], MARKED[event["kind"]])
    return sorted(found.items()) if len(found) <= 20 else []


def _facts(summary: Summary) -> str:
    facts = (
        ("steps", f"{summary.steps:,}"),
        ("tokens", f"{summary.tokens:,}"),
        ("time in steps", clock_time(summary.training_s)),
        ("speed", f"{short(summary.tokens_per_s)} tokens/s"),
        ("waiting for data", f"{100 * summary.data_wait:.1f} %"),
        ("training loss", f"{summary.first_loss:.4f} → {summary.last_loss:.4f}"),
        ("checkpoint", summary.checkpoint or "none"),
    )
    return (
        '<dl class="facts">'
        + "".join(f"<div><dt>{name}</dt><dd>{_text(value)}</dd></div>" for name, value in facts)
        + "</dl>"
    )


def _sources(summary: Summary) -> str:
    rows = [
        (
            source.name,
            f"{source.tokens:,}",
            f"{100 * source.share:.1f} %",
            _loss(source.last_loss),
            _loss(source.first_val_loss),
            _loss(source.last_val_loss),
            _loss(source.last_val_bits_per_byte),
            "–" if source.fall is None else f"{100 * source.fall:.1f} %",
        )
        for source in summary.sources
    ]
    heads = ("source", "tokens", "share", "train loss", "first validation", "last validation", "bits per byte", "fall")
    return _table(heads, rows, text_columns=(0,))


def _scores(summary: Summary) -> str:
    """A table of tasks, a column for each of the newest checkpoints that were scored; nothing where none was."""
    steps = sorted({int(step) for values in summary.scores.values() for step in values})[-MOST_SCORED:]
    if not steps:
        return ""
    rows = [(name, *(_loss(values.get(str(step))) for step in steps)) for name, values in summary.scores.items()]
    return "<h2>Tasks</h2>" + _table(("task", *(f"step {step:,}" for step in steps)), rows, text_columns=(0,))


def _events(run: RunData) -> str:
    told = [event for event in run.journal if event["kind"] not in QUIET]
    rows = [
        (_clock(event.get("time")), event.get("step", ""), event["kind"], event.get("by", ""), _words(event))
        for event in told[-MOST_EVENTS:]
    ]
    more = len(told) - len(rows)
    note = f"<p>{more:,} earlier events are in journal.jsonl.</p>" if more else ""
    return note + _table(("time (UTC)", "step", "event", "by", ""), rows, text_columns=(0, 2, 3, 4))


def _clock(seconds: Any) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
    except (TypeError, ValueError, OverflowError, OSError):
        return ""


def _words(event: dict[str, Any]) -> str:
    """An event's data in a line: short values only, a run's start has its whole configuration."""
    data = event.get("data")
    if not isinstance(data, dict):
        return ""
    told = [f"{key}: {value}" for key, value in data.items() if value not in (None, "", [], {})]
    return "; ".join(itertools.islice((words for words in told if len(words) <= 200), 8))


def _table(heads: Sequence[str], rows: Sequence[Sequence[object]], text_columns: Sequence[int]) -> str:
    def cells(kind: str, values: Sequence[object]) -> str:
        classes = [' class="text"' if number in text_columns else "" for number in range(len(heads))]
        return "".join(f"<{kind}{of}>{_text(value)}</{kind}>" for of, value in zip(classes, values, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{cells("th", heads)}</tr></thead><tbody>{body}</tbody></table></div>'


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _text(value: object) -> str:
    """Anything as text of a page."""
    return html.escape(str(value), quote=True)
