"""What deciding the mixture costs: CPU time of each policy, per update and per step, beside the step it decides.

    python benchmarks/policy_overhead.py

Each policy runs behind its guard-rails, hears one report of every source a step, as training would give it, and hands
out its state after every step, as the scheduler asks. Per number of sources:

    decision  mean CPU time of a step's decision, and of the dearest one (ADO's and Mastery's are fits)
    planning  the rest of a step's plan: mixer, slots, lanes (`DryRun` with `static`)
    data      a whole step of the scheduler, no trainer: read, encode and pack 131,072 tokens of text, on one core

The ratio that counts is decision / data: training takes longer than its data on one core. Also: what a mixture event
costs in the journal, and after how many steps a report shapes a batch.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import orjson
from loading.result import circumstances, result_options, versions, write_result
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from data_scheduler import DataConfig, Feedback, Journal, Scheduler
from data_scheduler.dry_run import DryRun
from data_scheduler.policies import Policy
from data_scheduler.policies.context import Context, SourceSize
from data_scheduler.policies.guard import open_policy

RESULT = Path(__file__).parent / "results" / "policy_overhead.json"
SOURCES = (7, 50)
TOKENS = 64 * 2048
HORIZON = 8


def names_of(sources: int) -> list[str]:
    return [f"s{number:02d}" for number in range(sources)]


def options(kind: str, sources: int) -> dict[str, Any]:
    """As they would be for a run of 100,000 steps."""
    stages = [{"from_share": 0.0, "weights": {"s00": 1}}, {"from_share": 1.0, "weights": {"s01": 1}}]
    return {
        "aioli": {"round_steps": 2000},
        "doremi": {"reference": "recorded"},
        "pacing": {"function": "root", "replay": 0.1},
        "schedule": {"stages": stages, "shape": "cosine"},
        "skill_it": {"round_steps": 100, "graph": {"s00": dict.fromkeys(names_of(sources), 0.5)}},
    }.get(kind, {})


def config_of(kind: str, sources: int, **more: Any) -> DataConfig:
    listed = [{"name": name, "paths": [name], "val_paths": [name]} for name in names_of(sources)]
    policy = {"kind": kind, "options": options(kind, sources), "horizon": HORIZON, "guard": {"min_share": 1e-3}}
    base = {"tokenizer": "t", "sources": listed, "policy": policy, "prefetch": 0}
    return DataConfig.model_validate({**base, **more})


def opened(kind: str, sources: int) -> Policy:
    names = names_of(sources)
    context = Context(
        tuple(names),
        run_steps=100_000,
        horizon=HORIZON,
        bands={"halves": tuple(names[: sources // 2]), "others": tuple(names[sources // 2 :])},
        held_out=frozenset(names),
        size_of=lambda name: SourceSize(1 << 30, 1e8 * (1 + names.index(name))),
        tokens_before=lambda step: step * TOKENS,
        recall=lambda name, measure: dict.fromkeys(names, 2.0) if name.startswith("losses") else measure(),
    )
    return open_policy(config_of(kind, sources), context)


def decide(kind: str, sources: int, steps: int) -> dict[str, float]:
    """CPU time of the decisions of `steps` steps, in microseconds."""
    policy, names = opened(kind, sources), names_of(sources)
    shares = dict.fromkeys(names, 1 / sources)
    rng = random.Random(0)
    times, changes, before = [], 0, None
    for step in range(steps):
        losses = {
            name: 1.5 + 0.01 * place + 8 * (1 + step) ** -0.3 + rng.gauss(0, 0.05) for place, name in enumerate(names)
        }
        wants = getattr(policy, "wants_validation", None)
        held_out = losses if wants is not None and wants(step) else {}
        report = Feedback(step, losses, dict.fromkeys(names, TOKENS // sources), held_out, shares)
        began = time.process_time_ns()
        weights = policy.weights(step + HORIZON, [report] if policy.uses_feedback else [])
        policy.state_dict()
        times.append((time.process_time_ns() - began) / 1e3)
        changes += weights != before
        before = dict(weights)
    return {
        "decision_us": round(statistics.mean(times), 1),
        "dearest_us": round(max(times), 1),
        "changes_per_1000_steps": round(1000 * changes / steps, 1),
    }


def plan(sources: int, steps: int) -> float:
    """CPU time of planning a step, in microseconds."""
    run = iter(DryRun(config_of("static", sources, global_batch_size=64, lanes=64), run_steps=100_000))
    next(run)
    began = time.process_time()
    for _ in islice(run, steps):
        pass
    return (time.process_time() - began) / steps * 1e6


def make_corpus(folder: Path, sources: int) -> None:
    """Text of Zipfian words, 1 MB a source, and a tokenizer for it."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlucmfwypvbgkjqxz", k=rng.randint(2, 10))) for _ in range(20_000)]
    ranks = [1 / (rank + 2) for rank in range(len(words))]
    texts = [" ".join(rng.choices(words, ranks, k=min(3000, int(60 * rng.paretovariate(1.1))))) for _ in range(1500)]
    lines = [orjson.dumps({"text": text}) + b"\n" for text in texts]
    for name in names_of(sources):
        rng.shuffle(lines)
        (folder / f"{name}.jsonl").write_bytes(b"".join(lines))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8000, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts[:300], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


def read(folder: Path, sources: int, steps: int) -> float:
    """CPU time of a step of the scheduler, in microseconds; the median of some, so that no first opening counts."""
    listed = [{"name": name, "paths": [str(folder / f"{name}.jsonl")]} for name in names_of(sources)]
    config = {"tokenizer": str(folder / "tokenizer.json"), "sources": listed, "prefetch": 0, "lanes": 64}
    shape = {"global_batch_size": 64, "seq_len": TOKENS // 64, "cache_dir": str(folder / "cache")}
    scheduler = Scheduler(DataConfig.model_validate({**config, **shape}))
    times = []
    for _ in range(steps):
        began = time.process_time()
        next(scheduler)
        times.append((time.process_time() - began) * 1e6)
    return statistics.median(times)


def journal_event(folder: Path, sources: int, count: int = 200) -> dict[str, float]:
    """What a mixture costs in the journal: CPU and wall-clock time (it waits for the disk), bytes."""
    journal = Journal(folder / f"{sources}.journal")
    weights = {"weights": {name: 0.123456789 + place for place, name in enumerate(names_of(sources))}}
    cpu, wall = time.process_time(), time.perf_counter()
    for step in range(count):
        event = journal.append("mixture", step, weights, "policy:odm")
    return {
        "cpu_us": round((time.process_time() - cpu) / count * 1e6, 1),
        "wall_us": round((time.perf_counter() - wall) / count * 1e6, 1),
        "bytes": len(event.line()),
    }


def latency(kind: str) -> int:
    """Steps from a report that differs to the first mixture that does."""

    class Losses:
        said = "made up"

        def __init__(self, bump: float) -> None:
            self.bump = bump

        def at(self, step: int) -> dict[str, float]:
            return {name: 3.0 + (self.bump if step == 20 and name == "s00" else 0.0) for name in names_of(3)}

    def asked(bump: float) -> list[list[int]]:
        run = DryRun(config_of(kind, 3, global_batch_size=64, lanes=64), losses=Losses(bump), run_steps=100)
        return [draw.asked.tolist() for draw in islice(run, 60)]

    return next(step for step, (a, b) in enumerate(zip(asked(0.0), asked(2.0), strict=True)) if a != b) - 20


def measure(kinds: list[str], steps: int, progress: Callable[[str], None]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_corpus(folder, max(SOURCES))
        for sources in SOURCES:
            data, planned = read(folder, sources, 12), plan(sources, 2000)
            progress(f"{sources} sources: planning {planned:.0f} µs, data {data / 1e3:.0f} ms a step")
            policies = {}
            for kind in kinds:
                found = decide(kind, sources, steps)
                found["of_planning"] = round(found["decision_us"] / planned, 3)
                found["of_data_step"] = round(found["decision_us"] / data, 6)
                policies[kind] = found
                progress(
                    f"  {kind:13} {found['decision_us']:8.1f} µs a step, {found['dearest_us']:9.0f} at most, "
                    f"{found['of_planning']:7.3f} of planning, {100 * found['of_data_step']:7.4f} % of a data step"
                )
            results[str(sources)] = {
                "planning_us": round(planned, 1),
                "data_step_us": round(data, 1),
                "journal_event": journal_event(folder, sources),
                "policies": policies,
            }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000, help="steps decided by each policy")
    result_options(parser, RESULT)
    given = parser.parse_args()
    kinds = [
        "static", "proportional", "temperature", "unimax", "schedule", "odm", "ado", "skill_it", "doremi", "aioli",
        "mastery", "pacing",
    ]  # fmt: skip
    results = measure(kinds, given.steps, lambda line: print(line, flush=True))
    waits = {kind: latency(kind) for kind in ("odm",)}
    print(f"a report shapes the batch of {waits['odm']} steps later (data.policy.horizon: {HORIZON})")
    result = {
        **circumstances("policy_overhead.py"),
        "versions": versions(["numpy", "tokenizers", "gigatoken"]),
        "tokens_per_step": TOKENS,
        "horizon": HORIZON,
        "latency_steps": waits,
        "sources": results,
    }
    write_result(given.out, result)


if __name__ == "__main__":
    main()
