"""Writes `dashboards/grafana/*.json` from the list of metrics: `PYTHONPATH=. python dashboards/generate.py`.

    run.json      what a run does: loss, speed, data, checkpoints, disk, restarts
    model.json    numbers from inside the model, by layer
    ranks.json    every rank's part

Each metric that is exported to Prometheus has a panel: its unit, description and query follow from its entry in
`pretrain.metrics.registry`. A metric that no row names lands in the row "Other". Import the files in Grafana
("Dashboards > New > Import") or have them provisioned; `docs/monitoring.md` tells how. Made for Grafana 11 and later.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from grafana_foundation_sdk.builders import dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import TimeZoneBrowser
from grafana_foundation_sdk.models.dashboard import DataSourceRef

from pretrain.metrics.registry import METRICS, Metric

FOLDER = Path(__file__).parent / "grafana"
RUN = '{run=~"$run"}'
DATASOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
UNITS = {"s": "s", "bytes": "bytes", "tokens/s": "short"}
"""Grafana's names of our units; all others are plain numbers."""
FLOWS = frozenset({"tokens", "documents"})
"""Units of counters that are drawn as a rate; other counters have few events, and their totals say more."""

ROWS = {
    "Loss": (
        "loss",
        "source_loss",
        "val_loss",
        "val_bits_per_byte",
        "mtp_loss",
        "grad_norm",
        "lr",
        "loss_scale",
        "not_finite",
        "anomalies",
    ),
    "Speed": (
        "tokens_per_s",
        "step_s",
        "passes_s",
        "update_s",
        "model_flops_per_s",
        "mfu",
        "mfu_causal",
        "tokens",
        "input_tokens",
        "step",
        "seq_len",
        "global_batch_size",
    ),
    "Data": (
        "data_wait_s",
        "source_tokens",
        "trained_tokens",
        "batch_documents",
        "trained_documents",
        "rejects",
    ),
    "Machine": ("peak_memory_bytes", "disk_free_bytes", "checkpoint_age_s", "time", "restarts", "rollbacks"),
}


@dataclass(frozen=True)
class Query:
    """One PromQL expression and what its lines are called."""

    expr: str
    legend: str


def queries(metric: Metric) -> list[Query]:
    """What is asked of Prometheus to draw `metric`."""
    if metric.name == "time":
        return [Query(f"time() - {metric.exported}{RUN}", "{{run}}, time since the last step")]
    if metric.label == "rank":
        # Never a line for each of a thousand ranks: the spread, and who is at its upper end.
        ends = [Query(f"{word} by (run) ({metric.exported}{RUN})", f"{{{{run}}}}, {word}") for word in ("min", "avg")]
        return [*ends, Query(f"topk(3, {metric.exported}{RUN})", "{{run}}, rank {{rank}}")]
    legend = f"{{{{run}}}} {{{{{metric.label}}}}}" if metric.label else "{{run}}"
    if metric.kind == "gauge":
        return [Query(f"{metric.exported}{RUN}", legend)]
    total = f"{metric.exported}_total{RUN}"
    return [Query(f"rate({total}[$__rate_interval])" if metric.unit in FLOWS else total, legend)]


def panel(metric: Metric) -> timeseries.Panel:
    """A graph of one metric."""
    per_second = metric.kind != "gauge" and metric.unit in FLOWS
    title = f"{metric.name} (per second)" if per_second else metric.name
    made = (
        timeseries.Panel()
        .title(title)
        .description(f"{metric.meaning[0].upper()}{metric.meaning[1:]} ({metric.unit}).")
        .unit(UNITS.get(metric.unit, "short"))
        .datasource(DATASOURCE)
        .span(8)
        .height(8)
        .fill_opacity(0)
        .line_width(1)
    )
    for number, query in enumerate(queries(metric)):
        made = made.with_target(_target(query, chr(ord("A") + number)))
    return made


def _target(query: Query, ref: str) -> prometheus.Dataquery:
    return prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(ref).datasource(DATASOURCE)


def _stat(title: str, expr: str, unit: str) -> stat.Panel:
    target = _target(Query(expr, "{{run}}"), "A")
    return stat.Panel().title(title).unit(unit).datasource(DATASOURCE).span(4).height(4).with_target(target)


def _empty(title: str, uid: str, description: str) -> dashboard.Dashboard:
    runs = (
        dashboard.QueryVariable("run").label("run").query("label_values(headrace_step, run)").datasource(DATASOURCE)
    ).include_all(True)
    return (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags(["headrace"])
        .refresh("30s")
        .time("now-6h", "now")
        .timezone(TimeZoneBrowser)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .with_variable(runs.multi(True))
    )


def run_dashboard() -> dashboard.Dashboard:
    """What a run does."""
    made = _empty("Headrace: run", "headrace-run", "Loss, speed, data, checkpoints, disk and restarts of runs.")
    wait = f"avg_over_time(headrace_data_wait_seconds{RUN}[5m]) / avg_over_time(headrace_step_seconds{RUN}[5m])"
    for title, expr, unit in (
        ("step", f"headrace_step{RUN}", "none"),
        ("loss", f"headrace_loss{RUN}", "none"),
        ("tokens/s, 5 minutes", f"avg_over_time(headrace_tokens_per_second{RUN}[5m])", "short"),
        ("waiting for data", wait, "percentunit"),
        ("since the last step", f"time() - headrace_last_step_timestamp_seconds{RUN}", "s"),
        ("checkpoint age", f"headrace_checkpoint_age_seconds{RUN}", "s"),
    ):
        made = made.with_panel(_stat(title, expr, unit))
    for row, metrics in _rows():
        made = made.with_row(dashboard.Row(row))
        for metric in metrics:
            made = made.with_panel(panel(metric))
    return made


def _rows() -> Iterator[tuple[str, list[Metric]]]:
    flat = {metric.name: metric for metric in METRICS if metric.exported and metric.label not in ("layer", "rank")}
    inside = {metric.name for metric in flat.values() if metric.made_by == "pretrain.dynamics"}
    for row, names in ROWS.items():
        yield row, [flat.pop(name) for name in names]
    other = [metric for name, metric in flat.items() if name not in inside]
    if other:
        yield "Other", other


def model_dashboard() -> dashboard.Dashboard:
    """Numbers from inside the model."""
    made = _empty(
        "Headrace: inside the model",
        "headrace-model",
        "By layer, in the steps of metrics.dynamics.every; docs/how-to/watch-the-model.md says what to look for.",
    )
    for metric in METRICS:
        if metric.exported and (metric.label == "layer" or metric.made_by == "pretrain.dynamics"):
            made = made.with_panel(panel(metric))
    return made


def ranks_dashboard() -> dashboard.Dashboard:
    """Every rank's part."""
    made = _empty("Headrace: ranks", "headrace-ranks", "Every rank's part, in the steps of metrics.ranks_every.")
    for metric in METRICS:
        if metric.exported and metric.label == "rank":
            made = made.with_panel(panel(metric))
    return made


DASHBOARDS = {"run.json": run_dashboard, "model.json": model_dashboard, "ranks.json": ranks_dashboard}


def text(made: dashboard.Dashboard) -> str:
    """A dashboard as its file has it."""
    return json.dumps(made.build(), cls=JSONEncoder, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, make in DASHBOARDS.items():
        (FOLDER / name).write_text(text(make()), encoding="utf-8")
