"""What `metrics.dynamics` costs: CPU time of a step that is measured, beside steps of the same run that are not.

    python benchmarks/dynamics_cost.py

One process trains a `qwen3` (GQA, QK-norm) on random tokens; measured and plain steps take turns, in an order that
changes from pair to pair. A measured step's extra, over ten, is what `metrics.dynamics.every: 10` adds to a run:

    measured   median over pairs of (CPU time of the measured step / of its plain neighbour)
    every_10   1 + (measured - 1) / 10; the bound that we hold ourselves to is 1.01
    parts      the share of the extra in each kind of work, from a measured step under a profiler's stopwatch

Rows of short documents are what packed text looks like; one document as long as the row is the worst case for the
attention logits, whose work grows with the square of its length.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loading.result import circumstances, result_options, versions, write_result

from parallel import process_groups
from parallel.layout import Layout
from pretrain.config import RunConfig, validate_config
from pretrain.dynamics import activations, noise_scale, totals, weights
from pretrain.microbatch import MicroBatch, split_batch
from pretrain.models.sizes import count_parameters
from pretrain.step import TrainState, build_state, train_step

RESULT = Path(__file__).parent / "results" / "dynamics_cost.json"
VOCAB = 4096
SHAPES = {
    "1024 tokens, documents of 300": {"seq_len": 1024, "sequences": 4, "document": 300},
    "2048 tokens, documents of 300": {"seq_len": 2048, "sequences": 2, "document": 300},
    "2048 tokens, one document": {"seq_len": 2048, "sequences": 2, "document": None},
}
"""4,096 tokens a step each. A real step has a thousand times as many, so that what is done once a step costs less."""
QUICK = {"64 tokens": {"seq_len": 64, "sequences": 2, "document": 20}}


def config_of(seq_len: int, sequences: int, hidden_size: int, num_layers: int) -> RunConfig:
    """A run's configuration; its data are never read."""
    model = {
        "family": "qwen3",
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "num_attention_heads": hidden_size // 64,
        "num_query_groups": hidden_size // 128,
        "ffn_hidden_size": hidden_size * 11 // 4,
    }
    source = {"name": "random", "paths": ["random"]}
    data = {"tokenizer": "t", "sources": [source], "seq_len": seq_len, "global_batch_size": sequences}
    raw = {"run": {"dir": "unused"}, "model": model, "data": data, "train": {"steps": 1, "eval_sequences": 0}}
    return validate_config(raw, "dynamics_cost.py")


def batch_of(seq_len: int, sequences: int, document: int | None) -> list[MicroBatch]:
    """Micro-batches of one sequence; documents of geometric lengths around `document`, or one."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, VOCAB, (sequences, seq_len + 1))
    starts = []
    for _ in range(sequences):
        begins = np.cumsum(random.geometric(1 / document, size=seq_len)) if document else np.zeros(0)
        starts.append(np.concatenate(([0], begins[begins <= seq_len])).astype(np.int32))
    return split_batch(tokens, starts, np.zeros(sequences, dtype=np.int64), 1)


def cpu_time(act: Callable[[], Any]) -> float:
    """Seconds of this process, all its threads."""
    began = time.process_time()
    act()
    return time.process_time() - began


@contextmanager
def stopwatches(spent: dict[str, float]) -> Iterator[None]:
    """Adds to `spent` what each kind of a measurement's work takes."""
    watched: list[tuple[str, Any, str]] = [
        ("attention logits", activations, "largest_logit"),
        ("query, key and block norms", activations.Activations, "_attention"),
        ("query, key and block norms", activations.Activations, "_block"),
        ("output logits", activations.Activations, "_output"),
        ("micro-batch gradients", noise_scale, "square_sum"),
        ("weights and gradients", weights.Weights, "before_update"),
        ("weights and gradients", weights.Weights, "after_update"),
        ("totals", totals.Totals, "reduce"),
    ]
    kept = [(place, name, getattr(place, name)) for _, place, name in watched]

    def timed(kind: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            began = time.process_time()
            try:
                return act(*given)
            finally:
                spent[kind] = spent.get(kind, 0.0) + time.process_time() - began

        return run

    for (kind, place, name), (_, _, act) in zip(watched, kept, strict=True):
        setattr(place, name, timed(kind, act))
    try:
        yield
    finally:
        for place, name, act in kept:
            setattr(place, name, act)
    norms = "query, key and block norms"
    spent[norms] = spent.get(norms, 0.0) - spent.get("attention logits", 0.0)  # done inside


def measure(shape: dict[str, Any], hidden_size: int, num_layers: int, pairs: int) -> dict[str, Any]:
    """One shape's ratio."""
    config = config_of(shape["seq_len"], shape["sequences"], hidden_size, num_layers)
    layout = Layout(1)
    state: TrainState = build_state(config, layout, process_groups.initialize(layout, seed=1), VOCAB)
    batch = batch_of(**shape)

    def step(measured: bool) -> None:
        state.measured = measured
        train_step(state, batch, 1e-4)

    step(True)
    step(False)
    plain, ratios = [], []
    for pair in range(pairs):
        order = (False, True) if pair % 2 else (True, False)
        taken = {measured: cpu_time(lambda measured=measured: step(measured)) for measured in order}  # type: ignore[misc]
        plain.append(taken[False])
        ratios.append(taken[True] / taken[False])
    spent: dict[str, float] = {}
    with stopwatches(spent):
        step(True)
    process_groups.shutdown()
    measured = statistics.median(ratios)
    return {
        "parameters": count_parameters(config.model, VOCAB),
        "micro_batches": shape["sequences"],
        "plain_step_cpu_s": round(statistics.median(plain), 3),
        "measured": {"median": round(measured, 4), "min": round(min(ratios), 4), "max": round(max(ratios), 4)},
        "every_10": round(1 + (measured - 1) / 10, 4),
        "parts_of_a_step": {kind: round(seconds / statistics.median(plain), 4) for kind, seconds in spent.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=9, help="measured and plain steps of each shape")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="a shape that says nothing, for tests")
    result_options(parser, RESULT)
    given = parser.parse_args()
    torch.set_num_threads(1)  # waiting threads would count as CPU time
    shapes = QUICK if given.quick else SHAPES
    results = {}
    for name, shape in shapes.items():
        found = results[name] = measure(shape, given.hidden_size, given.layers, given.pairs)
        print(
            f"{name}: plain step {found['plain_step_cpu_s']:.2f} s, measured × {found['measured']['median']:.3f}, "
            f"every 10: {100 * (found['every_10'] - 1):+.2f} %",
            flush=True,
        )
        for kind, share in sorted(found["parts_of_a_step"].items(), key=lambda each: -each[1]):
            print(f"    {kind:28} {100 * share:6.2f} % of a step")
    result = {
        **circumstances("dynamics_cost.py"),
        "versions": versions(["torch", "megatron-core"]),
        "model": {"hidden_size": given.hidden_size, "num_layers": given.layers, "vocab_size": VOCAB},
        "shapes": results,
    }
    write_result(given.out, result)


if __name__ == "__main__":
    main()
