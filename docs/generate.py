"""Writes the reference pages that are made from the code: `python docs/generate.py`.

    docs/configuration.md   from the pydantic models of `pretrain.config`
    docs/metrics.md         from the list in `pretrain.metrics.registry`
    docs/preparation.md     from the pydantic models of `data_scheduler.prep.config`
    docs/data_speed.md      its tables, from benchmarks/results/data_*.json
    docs/how-to/curriculum-by-bands.md   likewise, from benchmarks/results/data_bands.json
    docs/how-to/gpu.md      its table of presets, from `pretrain.models`
    docs/recovery.md        its tables, from benchmarks/results/crash_matrix.json, loss_guard.json and recovery.json
    docs/parallel.md        its tables, from benchmarks/results/parallel_equivalence.json
    docs/kernels.md         its table, by docs/kernel_table.py from benchmarks/results/kernels.json
    docs/mixing.md          its tables, from benchmarks/results/policy_overhead.json and mixing_*.json

`tests/docs/test_docs.py` fails when a page is not what this script would write.
"""

import json
import re
import sys
from pathlib import Path

from parallel.layout import Layout
from pretrain.metrics.registry import METRICS
from pretrain.models.memory import Batch, memory_by_stage
from pretrain.models.presets import PRESETS
from pretrain.models.sizes import count_parameters, embedding_parameters, flops_per_token

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

from configuration_pages import NOTE, Schema, configuration, preparation, table  # noqa: E402

METRIC_PAGE = f"""{NOTE}
# Metrics

`<run>/metrics.jsonl` has one JSON object a line. There are three kinds of record: an evaluation has `val_loss`, scores
of tasks have `eval`, every other record is a training step.

- A training record's `step` counts from 0 and names the optimizer step it describes. Its loss was computed before that
  step's update.
- An evaluation's `step` is the number of optimizer steps done. So both kinds at the same `step` saw the same weights.
- Scores of tasks are of the checkpoint of their `step`; `headrace eval` adds them at the end, whenever it is called.
- Floats are written so that they read back to the same bits; NaN and infinities are the strings `"NaN"`, `"Infinity"`
  and `"-Infinity"`. `pretrain.metrics.read_records` turns them back.
- A resumed run does the steps after its checkpoint again. The records they replace move to
  `metrics.superseded.jsonl`, so that `metrics.jsonl` has each step once.

Values per layer come in measured steps only, every `metrics.dynamics.every`; layers are called `0`, `1`, …, and besides
them `embedding`, `final_norm` and `output`. [Watch the model](how-to/watch-the-model.md) says what to look for.

In wandb and TensorBoard, training values are called `train/<name>` (per source or layer `train/<name>/<source>`) and
held-out losses `val/loss/<source>` and `val/bits_per_byte/<source>`. In Prometheus every value has the label `run`,
values per source, layer or rank also `source`, `layer` or `rank`. Values per rank come every `metrics.ranks_every`
steps, in `metrics.jsonl` and Prometheus only; the others are of all ranks together. [Monitoring](monitoring.md) has
dashboards and alerts. Scores of tasks go to `metrics.jsonl` alone, as `eval`.
"""


def metrics() -> str:
    """The page about every value in `metrics.jsonl`."""
    rows = [
        (
            f"`{metric.name}`",
            f"per {metric.label}" if metric.label else "one value",
            metric.unit,
            metric.meaning,
            f"`{metric.made_by}`",
            f"`{metric.exported}{'_total' if metric.kind in ('counter', 'sum') else ''}`" if metric.exported else "",
        )
        for metric in METRICS
    ]
    return f"{METRIC_PAGE}\n{table(('name', 'shape', 'unit', 'meaning', 'measured by', 'in Prometheus'), rows)}"


def data_speed() -> str:
    """The page with every table between `<!-- name -->` and `<!-- end -->` made from its result file."""
    sys.path.insert(0, str(DOCS.parent / "benchmarks"))
    import data_scale
    import data_soak
    from loading import report

    def plain(rows: list[tuple[str, str]]) -> str:
        return table(("what", "measured"), rows)

    page = (DOCS / "data_speed.md").read_text(encoding="utf-8")
    makers = {
        "throughput": report.markdown,
        "soak": lambda result: plain(data_soak.rows(result)),
        "scale": lambda result: plain(data_scale.rows(result)),
    }
    for name, make in makers.items():
        result = json.loads((DOCS.parent / "benchmarks" / "results" / f"data_{name}.json").read_text())
        body = f"{make(result)}\n{_facts(result)}"
        page = _replaced(page, name, body)
    return page


def _facts(result: Schema) -> str:
    """What a result was measured on, in a sentence."""
    machine = result["machine"]
    found = result["versions"]
    parts = list(found.values()) if "ours" in found else [found]
    words = [f"{name} {version}" for part in parts for name, version in part.items()]
    listed = f" Versions: {', '.join(dict.fromkeys(words))}." if words else ""
    return (
        f"`{result['command']}` on {result['date']}: {machine['cpu']}, {machine['cores']} cores, Python "
        f"{machine['python']}, {machine['load']}.{listed}\n"
    )


def mixing() -> str:
    """The page with its tables made from their result files."""
    page = (DOCS / "mixing.md").read_text(encoding="utf-8")
    result = json.loads((DOCS.parent / "benchmarks" / "results" / "policy_overhead.json").read_text())
    few, many = result["sources"]
    rows = [
        (
            f"`{kind}`",
            *(
                cell
                for policy in (result["sources"][few]["policies"][kind], result["sources"][many]["policies"][kind])
                for cell in (
                    f"{policy['decision_us']:.0f} µs",
                    f"{policy['dearest_us'] / 1e3:.1f} ms",
                    f"{100 * policy['of_data_step']:.2f} %",
                )
            ),
        )
        for kind in result["sources"][few]["policies"]
    ]
    heads = [(f"{n} sources: a step", "the dearest", "of a data step") for n in (few, many)]
    event = result["sources"][few]["journal_event"]
    facts = _facts(result) + (
        f"\nA data step reads, encodes and packs {result['tokens_per_step']:,} tokens of generated text on one core: "
        f"{result['sources'][few]['data_step_us'] / 1e3:.0f} ms of CPU time, an easy text. A mixture event takes "
        f"{event['wall_us'] / 1e3:.1f} ms in the journal, waiting for this machine's disk, in the thread that prepares "
        "batches ahead.\n"
    )
    body = f"{table(('policy', *heads[0], *heads[1]), rows)}\n{facts}"
    page = _replaced(page, "overhead", body)
    sys.path.insert(0, str(DOCS.parent))
    from benchmarks.mixing import report

    for name, make in (("lego", report.lego_table), ("real_text", report.text_table)):
        result = json.loads((DOCS.parent / "benchmarks" / "results" / f"mixing_{name}.json").read_text())
        page = _replaced(page, name, f"{table(*make(result))}\n{_facts(result)}")
    return page


def _replaced(page: str, name: str, body: str) -> str:
    """`page` with `body` between `<!-- name -->` and the next `<!-- end -->`."""
    return re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{body}{m[2]}", page, flags=re.DOTALL)


def bands() -> str:
    """The page with its table of costs made from the result file."""
    page = (DOCS / "how-to" / "curriculum-by-bands.md").read_text(encoding="utf-8")
    result = json.loads((DOCS.parent / "benchmarks" / "results" / "data_bands.json").read_text())
    by_format: dict[str, list[Schema]] = {}
    for row in result["rows"]:
        by_format.setdefault(row["format"], []).append(row)
    counts = [row["bands"] for row in next(iter(by_format.values())) if row["bands"] > 1]
    heads = [f"{n} bands" for n in counts] + [f"{n} bands, token cache" for n in counts]
    lines = [
        (
            f"`{name}`",
            *(f"{row[key]:.2f} times" for key in ("of_one", "cached_of_one") for row in rows if row["bands"] > 1),
        )
        for name, rows in by_format.items()
    ]
    body = f"{table(('', *heads), lines)}\n{_facts(result)}"
    return _replaced(page, "bands", body)


def gpu() -> str:
    """The page with its table of model sizes."""
    page = (DOCS / "how-to" / "gpu.md").read_text(encoding="utf-8")
    layout = Layout(8, distributed_optimizer=True)
    rows = []
    for name, model in PRESETS.items():
        vocab_size = model.vocab_size or 0
        total, seq_len = count_parameters(model, vocab_size), 2048 if model.family == "wonton" else 4096
        full, causal = flops_per_token(model, vocab_size, seq_len)
        needed = [
            max(
                stage.total
                for stage in memory_by_stage(model, vocab_size, layout, Batch(seq_len, 1, 8), recompute=recompute)
            )
            for recompute in ("none", "selective", "full")
        ]
        rows.append(
            (
                f"`{name}`",
                f"{model.num_layers} × {model.hidden_size:,}",
                f"{total / 1e9:.3f}",
                f"{(total - embedding_parameters(model, vocab_size)) / 1e9:.3f}",
                f"{full / 1e9:.1f} / {causal / 1e9:.1f}",
                " / ".join(f"{size / 1e9:.0f}" for size in needed),
            )
        )
    head = (
        "preset",
        "layers × hidden",
        "parameters, 10⁹",
        "without embeddings",
        "GFLOP a token, full / causal attention",
        "GB a GPU, recompute none / selective / full",
    )
    note = (
        "Operations and memory are of sequences of 4,096 tokens (wonton 2,048), one in a micro-batch, memory of `bf16` "
        "on 8 GPUs with `parallel.distributed_optimizer`; estimated.\n"
    )
    page = _replaced(page, "presets", f"{table(head, rows)}\n{note}")
    return _replaced(page, "train_throughput", _train_throughput())


def _train_throughput() -> str:
    """Tables of the training benchmark; a part that no machine has measured is left out, or says so."""
    sys.path.insert(0, str(DOCS.parent))
    from benchmarks.training import report

    path = DOCS.parent / "benchmarks" / "results" / "train_throughput.json"
    if not path.exists():
        return "`python benchmarks/train_throughput.py` writes the result that belongs here; there is none yet.\n"
    result = json.loads(path.read_text())
    gpu = result["gpu"]
    more = f"On a GPU: {gpu}.\n" if isinstance(gpu, str) else table(*report.gpu_table(result))
    parts = (table(*report.cpu_table(result)), f"{report.cpu_settings(result)}\n", more, _facts(result))
    return "\n".join(parts)


def parallel() -> str:
    """The page with its tables of layouts made from the result file."""
    sys.path.insert(0, str(DOCS.parent / "benchmarks"))
    import parallel_equivalence as made

    page = (DOCS / "parallel.md").read_text(encoding="utf-8")
    path = DOCS.parent / "benchmarks" / "results" / "parallel_equivalence.json"
    if not path.exists():
        return page
    result = json.loads(path.read_text())
    tables = {"equivalence": made.equivalence_table, "options": made.option_table, "reshard": made.reshard_table}
    for name, make in tables.items():
        page = _replaced(page, name, table(*make(result)) + ("" if name == "options" else f"\n{_facts(result)}"))
    return page


def kernels() -> str:
    """The page with its table of operators made from the result file."""
    import kernel_table

    page = (DOCS / "kernels.md").read_text(encoding="utf-8")
    result = json.loads((DOCS.parent / "benchmarks" / "results" / "kernels.json").read_text())
    operators = table(kernel_table.HEAD, kernel_table.rows(result))
    return _replaced(page, "operators", f"{operators}\n{kernel_table.facts(result)}")


def recovery() -> str:
    """The page with its tables made from the result files."""
    import recovery_tables

    page = (DOCS / "recovery.md").read_text(encoding="utf-8")
    for name, body in recovery_tables.parts(DOCS.parent / "benchmarks" / "results", table, _facts):
        page = _replaced(page, name, body)
    return page


PAGES = {
    "configuration.md": configuration,
    "metrics.md": metrics,
    "preparation.md": preparation,
    "data_speed.md": data_speed,
    "mixing.md": mixing,
    "how-to/gpu.md": gpu,
    "parallel.md": parallel,
    "kernels.md": kernels,
    "recovery.md": recovery,
    "how-to/curriculum-by-bands.md": bands,
}

if __name__ == "__main__":
    for page, make in PAGES.items():
        (DOCS / page).write_text(make(), encoding="utf-8")
