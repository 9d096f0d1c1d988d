"""Skill-It on the LEGO synthetic, beside sampling that does not listen.

    python -m benchmarks.mixing.skill_it

Skill-It's authors (arXiv 2307.14430) train on chains of five and report 36.5 points more accuracy than random sampling.
The arms here are theirs, each with a learning rate tuned for itself on a seed of its own:

    random           shares that grow with the skill, as in the authors' data: 1 : 1 : … : 3 : 5
    stratified       equal shares
    curriculum       half of the run one skill after the other, from the first; then all alike
    anti_curriculum  likewise, from the last
    skill_it         the policy with the graph the authors give: the second skill helps the first, third and fourth
    skill_it_short   likewise, in rounds a fifth as long: the losses of an untrained model soon leave the window
    skill_it_own     the policy with a graph estimated here, from short runs on one skill each

The last one's short runs are not counted in its tokens; nor are the runs that tuned the others.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.loading.result import circumstances, result_options, versions, write_result
from benchmarks.mixing import lego
from benchmarks.mixing.experiment import TUNING_SEED, Experiment, Trial, experiment_options
from benchmarks.mixing.report import plot_lego, show
from pretrain.skills_graph import SingleSourceRun, estimate_graph

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "mixing_lego.json"
PICTURE = ROOT / "docs" / "images" / "mixing_lego.png"
ARMS = ["random", "stratified", "curriculum", "anti_curriculum", "skill_it", "skill_it_short", "skill_it_own"]
RATES = [4e-3, 8e-3]
SEEDS = 5
ROUNDS = 6
"""Of Skill-It in a run, as in the paper."""
FULL = {
    "links": 4, "layers": 3, "hidden": 64, "heads": 4, "ffn": 128, "batch": 128, "steps": 300, "warmup": 30,
    "documents": 8_000, "evaluated": 128, "judged": 512, "graph_steps": 100,
}  # fmt: skip
QUICK = FULL | {"layers": 1, "batch": 16, "steps": 12, "warmup": 2, "documents": 400, "judged": 32, "graph_steps": 4}


def configuration(settings: dict[str, Any], corpus: Path, trial: Trial, own_graph: Any = None) -> dict[str, Any]:
    """The run's configuration. `own_graph`: {source: {source: weight}} of the arm skill_it_own."""
    names = lego.skills(settings["links"])
    sources = [
        {
            "name": name, "paths": [str(corpus / name / "train.jsonl")],
            "val_paths": [str(corpus / name / "held_out.jsonl")], "prompt": "{chain}", "text_key": "answer",
            "weight": weight,
        }
        for name, weight in static_weights(trial.arm, names).items()
    ]  # fmt: skip
    return {
        "model": {
            "family": "llama", "num_layers": settings["layers"], "hidden_size": settings["hidden"],
            "num_attention_heads": settings["heads"], "ffn_hidden_size": settings["ffn"],
        },
        "data": {
            "tokenizer": str(corpus / "tokenizer.json"), "sources": sources,
            # A packed sequence of seq_len + 1 tokens is one document.
            "seq_len": lego.tokens(settings["links"]) - 1, "document_end": "none",
            "global_batch_size": settings["batch"], "lanes": settings["batch"], "cache_dir": str(corpus / "cache"),
            "policy": {**policy(trial.arm, settings, names, own_graph), "horizon": 4}, "seed": trial.seed,
        },
        "train": {
            "steps": settings["steps"], "micro_batch_size": settings["batch"], "seed": trial.seed, "threads": 1,
            "eval_every": settings["steps"] // ROUNDS, "eval_sequences": settings["evaluated"],
        },
        "optimizer": {
            "lr": trial.lr, "min_lr": trial.lr / 10, "warmup_steps": settings["warmup"], "weight_decay": 0.0,
            "beta2": 0.98,
        },
        "checkpoint": {"every": 0},
        "metrics": {"progress": False},
    }  # fmt: skip


def static_weights(arm: str, names: list[str]) -> dict[str, float]:
    """Configured weights: `random` has those of the authors' data, `only …` one skill alone, the others equal ones."""
    if arm == "random":
        return dict(zip(names, [1.0] * (len(names) - 2) + [3.0, 5.0], strict=True))
    if arm.startswith("only "):
        return {name: float(name == arm.removeprefix("only ")) for name in names}
    return dict.fromkeys(names, 1.0)


def policy(arm: str, settings: dict[str, Any], names: list[str], own_graph: Any = None) -> dict[str, Any]:
    """The arm's `data.policy`."""
    if arm in ("curriculum", "anti_curriculum"):
        order = names if arm == "curriculum" else names[::-1]
        stages = [{"from_share": i / (2 * len(names)), "weights": {name: 1.0}} for i, name in enumerate(order)]
        stages.append({"from_share": 0.5, "weights": dict.fromkeys(names, 1.0)})
        return {"kind": "schedule", "options": {"stages": stages}}
    if arm.startswith("skill_it"):
        helped = {name: 0.5 for name in names[:4] if name != names[1]}
        graph = own_graph if arm == "skill_it_own" else {names[1]: helped}
        rounds = settings["steps"] // ROUNDS // (5 if arm == "skill_it_short" else 1)
        return {"kind": "skill_it", "options": {"graph": graph, "eta": 0.5, "window": 3, "round_steps": rounds}}
    return {"kind": "static"}


def measure(settings: dict[str, Any], arms: list[str], rates: list[float], seeds: list[int], work: Path) -> Any:
    """(the result's `arms`, the graph estimated: source → source → weight, None where no arm asks for it)."""
    corpus = work / f"lego-{settings['links']}-{settings['documents']}"
    if not (corpus / "tokenizer.json").exists():
        lego.write_lego(corpus, settings["links"], settings["documents"], settings["judged"], seed=0)
    names, own_graph = lego.skills(settings["links"]), dict[str, dict[str, float]]()

    def train(trial: Trial) -> dict[str, Any]:
        from benchmarks.mixing.training import train_once  # megatron: 20 s of CPU time, for nothing if all was kept

        alone = {"steps": settings["graph_steps"]} if trial.arm.startswith("only ") else {}
        raw = configuration(settings | alone, corpus, trial, own_graph)
        return train_once(raw, work / "run", settings["judged"], accuracy=True)

    experiment = Experiment(work, {"experiment": "lego", **settings}, train, lambda line: print(line, flush=True))
    found = experiment.run([arm for arm in arms if arm != "skill_it_own"], rates, seeds)
    if "skill_it_own" in arms:
        lr = found["stratified"]["lr"]
        alone = [experiment.result(Trial(f"only {name}", lr, TUNING_SEED)) for name in names]
        runs = [
            SingleSourceRun(name, settings["graph_steps"], run["curve"][0][1], run["curve"][-1][1])
            for name, run in zip(names, alone, strict=True)
        ]
        rows = estimate_graph(runs)["graph"]
        own_graph.update({i: dict(zip(names, row, strict=True)) for i, row in zip(names, rows, strict=True)})
        found |= experiment.run(["skill_it_own"], rates, seeds)
    return found, own_graph or None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    experiment_options(parser, ARMS, SEEDS, "three arms, one seed, a few steps")
    result_options(parser, RESULT, PICTURE)
    given = parser.parse_args()
    if given.plot:
        plot_lego(json.loads(given.plot.read_text()), given.picture)
        return
    settings = QUICK if given.quick else FULL
    arms, rates, seeds = given.arms, RATES, list(range(1, given.seeds + 1))
    if given.quick:
        arms, rates, seeds = ["stratified", "curriculum", "skill_it_own"], RATES[:1], [1]
    with tempfile.TemporaryDirectory() as temporary:
        found, graph = measure(settings, arms, rates, seeds, given.work or Path(temporary))
    result = {
        **circumstances("benchmarks.mixing.skill_it"),
        "versions": versions(["torch", "megatron-core", "numpy"]),
        "settings": {**settings, "sources": lego.skills(settings["links"]), "seeds": seeds, "learning_rates": rates},
        "own_graph": graph,
        "arms": found,
    }
    write_result(given.out, result)
    show(result)


if __name__ == "__main__":
    main()
