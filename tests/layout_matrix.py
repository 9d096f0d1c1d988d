"""Every layout the trainer has, and models that between them pair every option of a model with every other.

Tests of layouts go through `LAYOUTS`; `VARIANTS` is a covering array: of any two options every pair of values stands in
one of the eight, so what goes wrong when two meet shows without trying all 96 combinations.
"""

import os
from dataclasses import dataclass, field
from typing import Any

from tiny_run import BATCH, SEQ_LEN, VOCAB, tiny_batch

from parallel.layout import Layout
from pretrain.config import RunConfig, validate_config
from pretrain.step import StepResult, TrainState, build_state, train_step

OPTIONS = ("family", "num_query_groups", "qk_norm", "tie_embeddings", "z_loss", "recompute")
ROWS: tuple[tuple[Any, ...], ...] = (
    ("wonton", 8, False, False, 0.0, "none"),
    ("wonton", 4, True, False, 0.01, "none"),
    ("wonton", 8, True, False, 0.0, "selective"),
    ("llama", 4, False, True, 0.01, "selective"),
    ("llama", 4, True, False, 0.0, "full"),
    ("wonton", 8, False, True, 0.01, "full"),
    ("llama", 8, True, True, 0.0, "none"),
    ("wonton", 4, True, False, 0.0, "none"),
)
VARIANTS: tuple[dict[str, Any], ...] = tuple(dict(zip(OPTIONS, row, strict=True)) for row in ROWS)

EVERY = bool(os.environ.get("HEADRACE_WHOLE_MATRIX"))
"""Every model under every layout and every checkpoint into every layout, as for the tables of docs/parallel.md (an hour
of one core); by default a part of it that leaves nothing out: every layout, every option, every way to store."""
PAIRS = ((1, 3), (5, 6), (0, 4), (2, 3))
"""Rows of VARIANTS, a gated model and one with biases each; layouts take them in turn. In any two pairs that follow
each other every option has each of its values, but for one of the three kinds of recomputation."""


@dataclass(frozen=True)
class Entry:
    """A row of the matrix."""

    layout: Layout
    model: dict[str, Any] = field(default_factory=dict)
    """Keys of the model section that the layout is about; experts, for one."""

    def variants(self, rows: tuple[int, ...]) -> tuple[dict[str, Any], ...]:
        """The models to try, this entry's own keys included; `rows` are places in VARIANTS."""
        return tuple({**VARIANTS[row], **self.model} for row in rows)


TP_SP: dict[str, Any] = {"tensor_parallel_size": 2, "sequence_parallel": True}
ULYSSES: dict[str, Any] = {"context_parallel_size": 2, "context_parallel_method": "all_to_all"}
INTERLEAVED: dict[str, Any] = {"pipeline_parallel_size": 2, "virtual_pipeline_parallel_size": 2}
BREADTH_FIRST: dict[str, Any] = {**INTERLEAVED, "pipeline_schedule": "breadth_first"}
OVERLAPPED: dict[str, Any] = {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
EXPERTS: dict[str, Any] = {"family": "llama", "num_experts": 4, "moe_top_k": 2, "moe_ffn_hidden_size": 64}

LAYOUTS: dict[str, Entry] = {
    "dp2": Entry(Layout(2)),
    "dp4": Entry(Layout(4)),
    "dp2 zero1": Entry(Layout(2, distributed_optimizer=True)),
    "dp2 zero1 overlapped": Entry(Layout(2, **OVERLAPPED)),
    "dp2 fully sharded": Entry(Layout(2, fully_sharded=True)),
    "tp2": Entry(Layout(2, tensor_parallel_size=2)),
    "tp4": Entry(Layout(4, tensor_parallel_size=4)),
    "tp2+sp": Entry(Layout(2, **TP_SP)),
    "pp2": Entry(Layout(2, pipeline_parallel_size=2)),
    "pp4": Entry(Layout(4, pipeline_parallel_size=4)),
    "pp2 vpp2": Entry(Layout(2, **INTERLEAVED)),
    "pp2 vpp2 breadth-first": Entry(Layout(2, **BREADTH_FIRST)),
    "cp2": Entry(Layout(2, context_parallel_size=2)),
    "cp4": Entry(Layout(4, context_parallel_size=4)),
    "cp2 all-to-all": Entry(Layout(2, **ULYSSES)),
    "dp2 tp2": Entry(Layout(4, tensor_parallel_size=2)),
    "dp2 tp2+sp zero1": Entry(Layout(4, **TP_SP, distributed_optimizer=True)),
    "dp2 tp2+sp fully sharded": Entry(Layout(4, **TP_SP, fully_sharded=True)),
    "dp2 pp2": Entry(Layout(4, pipeline_parallel_size=2)),
    "tp2 pp2": Entry(Layout(4, tensor_parallel_size=2, pipeline_parallel_size=2)),
    "dp2 cp2": Entry(Layout(4, context_parallel_size=2)),
    "tp2+sp cp2": Entry(Layout(4, **TP_SP, context_parallel_size=2)),
    "tp2 cp2 all-to-all": Entry(Layout(4, tensor_parallel_size=2, **ULYSSES)),
    "tp2+sp pp2 cp2": Entry(Layout(8, **TP_SP, pipeline_parallel_size=2, context_parallel_size=2)),
    "ep2": Entry(Layout(2, expert_parallel_size=2), EXPERTS),
    "ep2 zero1": Entry(Layout(2, expert_parallel_size=2, distributed_optimizer=True), EXPERTS),
    "dp2 of experts": Entry(Layout(2), EXPERTS),
    "ep2 pp2": Entry(Layout(4, pipeline_parallel_size=2, expert_parallel_size=2), EXPERTS),
    "ep2 tp2+sp": Entry(Layout(4, **TP_SP, expert_parallel_size=2), EXPERTS),
    "dp2 tp2+sp pp2 vpp2 breadth-first zero1": Entry(Layout(8, **TP_SP, **BREADTH_FIRST, distributed_optimizer=True)),
}


def rows_of(name: str) -> tuple[int, ...]:
    """Which of VARIANTS a layout is tried with."""
    return tuple(range(len(VARIANTS))) if EVERY else PAIRS[list(LAYOUTS).index(name) % len(PAIRS)]


def variant_name(variant: dict[str, Any]) -> str:
    """A short name for people: `llama gqa qk-norm tied z-loss recompute=full`."""
    parts = [variant["family"], "gqa" if variant["num_query_groups"] < 8 else "mha"]
    parts += (
        ["qk-norm"] * variant["qk_norm"] + ["tied"] * variant["tie_embeddings"] + ["z-loss"] * bool(variant["z_loss"])
    )
    return " ".join([*parts, f"recompute={variant['recompute']}"])


def matrix_config(variant: dict[str, Any]) -> RunConfig:
    """A run of four layers with eight heads, micro-batches of two sequences of packed documents."""
    model = {
        "num_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 8,
        "ffn_hidden_size": 128,
        **{key: value for key, value in variant.items() if key != "recompute"},
        "max_z_loss": variant["z_loss"],
    }
    sources = [{"name": name, "paths": [name]} for name in ("code", "prose")]
    # Experts are balanced within a micro-batch, and which sequences share one depends on the data-parallel size.
    size = 1 if "num_experts" in variant else 2
    raw = {
        "run": {"dir": "unused"},
        "model": model,
        "data": {"tokenizer": "t", "sources": sources, "seq_len": SEQ_LEN, "global_batch_size": BATCH, "lanes": BATCH},
        "train": {"steps": 5, "micro_batch_size": size, "recompute": variant["recompute"]},
        # At 1e-2 rounding differences grow to 8e-5 of the gradient norm in five steps, at 1e-3 they stay below 1e-6.
        "optimizer": {"lr": 1e-3},
    }
    return validate_config(raw, "matrix")


def matrix_state(variant: dict[str, Any], layout: Layout, ranks: Any) -> TrainState:
    """A fresh model and optimizer; process groups of `layout` are open."""
    return build_state(matrix_config(variant), layout, ranks, VOCAB)


def steps_of(state: TrainState, first: int, last: int) -> list[StepResult]:
    """Steps `first` to `last` - 1 of the run that every layout shares."""
    ranks = state.ranks
    size = state.config.train.micro_batch_size
    batches = (tiny_batch(step, ranks.dp_rank, ranks.dp_size, size) for step in range(first, last))
    return [train_step(state, batch, state.config.optimizer.lr) for batch in batches]
