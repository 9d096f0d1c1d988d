"""Policies at equal tokens on real and generated text: mean held-out loss over eight sources of unequal difficulty.

    python -m benchmarks.mixing.real_text

Every arm is the same model, the same number of tokens and the same seeds; its learning rate is tuned for itself on a
seed of its own, since gains of curricula vanish when it is not ("Curriculum Learning with Adam"). Beside the policies
stand two controls that know nothing: `random`, shares drawn anew for each seed, and `reversed`, the shares of
`proportional` dealt out the other way round, the largest source getting the smallest share.

All policies have their defaults but for what is meant for long runs: `aioli` has four rounds of one sweep, and `ado`
fits to means of 2 reports, not 10, or half of the run would be over before its first fit.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.loading.result import circumstances, result_options, versions, write_result
from benchmarks.mixing.experiment import TUNING_SEED, Experiment, Trial, experiment_options
from benchmarks.mixing.report import plot_real_text, show
from benchmarks.mixing.sources import NAMES, write_sources

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "mixing_real_text.json"
PICTURE = ROOT / "docs" / "images" / "mixing_real_text.png"
ARMS = ["uniform", "proportional", "temperature", "odm", "ado", "aioli", "random", "reversed"]
RATES = [4e-3, 8e-3]
SEEDS = 3
FULL = {
    "layers": 2, "hidden": 192, "heads": 4, "ffn": 512, "vocab": 1024, "seq_len": 64, "batch": 8, "steps": 100,
    "warmup": 10, "evaluated": 4, "judged": 32,
}  # fmt: skip
QUICK = FULL | {"hidden": 32, "ffn": 64, "steps": 12, "warmup": 2, "evaluated": 1, "judged": 2}


def configuration(settings: dict[str, Any], corpus: Path, trial: Trial, shares: dict[str, float]) -> dict[str, Any]:
    """The run's configuration. `shares`: those of `proportional`, by source."""
    sources: list[dict[str, Any]] = [
        {"name": name, "paths": [str(corpus / name / "train-*")], "val_paths": [str(corpus / name / "val-*")]}
        for name in NAMES
    ]
    weights = static_weights(trial, shares)
    for source in sources:
        source["weight"] = weights[source["name"]]
    kinds = {"uniform": "static", "random": "static", "reversed": "static"}
    rounds = {"turn_steps": 2, "sweeps": 1, "round_steps": max(settings["steps"] // 4, 2 * len(NAMES) + 10)}
    policy = {
        "kind": kinds.get(trial.arm, trial.arm),
        "options": {"aioli": rounds, "ado": {"mean_of": 2}}.get(trial.arm, {}),
        "horizon": 4,
    }
    return {
        "model": {
            "family": "llama", "num_layers": settings["layers"], "hidden_size": settings["hidden"],
            "num_attention_heads": settings["heads"], "ffn_hidden_size": settings["ffn"],
        },
        "data": {
            "tokenizer": str(corpus / "tokenizer"), "sources": sources, "seq_len": settings["seq_len"],
            "global_batch_size": settings["batch"], "lanes": settings["batch"], "cache_dir": str(corpus / "cache"),
            "policy": policy, "seed": trial.seed,
        },
        "train": {
            "steps": settings["steps"], "micro_batch_size": settings["batch"], "seed": trial.seed, "threads": 1,
            "eval_sequences": settings["evaluated"],
        },
        "optimizer": {"lr": trial.lr, "min_lr": trial.lr / 10, "warmup_steps": settings["warmup"]},
        "checkpoint": {"every": 0},
        "metrics": {"progress": False},
    }  # fmt: skip


def static_weights(trial: Trial, shares: dict[str, float]) -> dict[str, float]:
    """The configured weights of an arm: what the static ones draw by, and all others begin with."""
    if trial.arm == "random":
        draw = random.Random(f"shares {trial.seed}")
        return {name: draw.expovariate(1.0) for name in NAMES}
    if trial.arm == "reversed":
        falling = sorted(NAMES, key=lambda name: -shares[name])
        return dict(zip(falling, sorted(shares.values()), strict=True))
    return dict.fromkeys(NAMES, 1.0)


def measure(settings: dict[str, Any], arms: list[str], rates: list[float], seeds: list[int], work: Path) -> Any:
    """The result's `arms`."""
    corpus = work / "text"
    if not (corpus / "tokenizer").exists():
        write_sources(corpus)
    shares: dict[str, float] = {}

    def train(trial: Trial) -> dict[str, Any]:
        from benchmarks.mixing.training import train_once  # megatron: 20 s of CPU time, for nothing if all was kept

        raw = configuration(settings, corpus, trial, shares)
        return train_once(raw, work / "run", judged=settings["judged"])

    experiment = Experiment(work, {"experiment": "real text", **settings}, train, lambda line: print(line, flush=True))
    shares.update(dict.fromkeys(NAMES, 0.0))
    shares.update(experiment.result(Trial("proportional", rates[0], TUNING_SEED))["shares"])
    return experiment.run(arms, rates, seeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    experiment_options(parser, ARMS, SEEDS, "two arms, one seed, a few steps")
    result_options(parser, RESULT, PICTURE)
    given = parser.parse_args()
    if given.plot:
        plot_real_text(json.loads(given.plot.read_text()), given.picture)
        return
    settings = QUICK if given.quick else FULL
    arms, rates, seeds = given.arms, RATES, list(range(1, given.seeds + 1))
    if given.quick:
        arms, rates, seeds = ["proportional", "odm"], RATES[:1], [1]
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(settings, arms, rates, seeds, given.work or Path(temporary))
    result = {
        **circumstances("benchmarks.mixing.real_text"),
        "versions": versions(["torch", "megatron-core", "numpy"]),
        "settings": {**settings, "sources": NAMES, "seeds": seeds, "learning_rates": rates},
        "arms": found,
    }
    write_result(given.out, result)
    show(result)


if __name__ == "__main__":
    main()
