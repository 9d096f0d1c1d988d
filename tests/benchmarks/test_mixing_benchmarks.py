"""The benchmarks of mixing: what the LEGO documents say is true, the experiments run to their tables, and what was kept
is not run again."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from benchmarks.mixing import lego, report, skill_it
from benchmarks.mixing.experiment import TUNING_SEED, Experiment, Trial

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def solved(chain: str) -> tuple[int, int]:
    """(value of the variable asked for, its place in the chain from 1 on), by going back clause by clause."""
    *clauses, question = chain.split(" ")
    says = dict(clause.split("=") for clause in clauses)
    assert len(says) == len(clauses), "a variable is set twice"
    assert question.endswith("?")
    name, flips, steps = question[:-1], 0, 1
    while says[name] not in ("0", "1"):
        flips += says[name].startswith("-")
        name = says[name].removeprefix("-")
        steps += 1
        assert steps <= len(clauses), "the chain goes round in a circle"
    return int(says[name]) ^ (flips % 2), steps


@settings(deadline=None, max_examples=200)
@given(links=st.integers(1, 5), seed=st.integers(0, 2**32), data=st.data())
def test_every_answer_is_what_the_chain_says(links: int, seed: int, data: st.DataObject) -> None:
    skill = data.draw(st.integers(1, links))
    document = lego.make_document(links, skill, random.Random(seed))
    assert solved(document.chain) == (int(document.answer), skill)
    assert len(document.chain.split(" ")) + 1 == lego.tokens(links)


def read(folder: Path, skill: str, split: str) -> Iterator[tuple[str, str]]:
    for line in (folder / skill / f"{split}.jsonl").read_text().splitlines():
        record = json.loads(line)
        yield record["chain"], record["answer"]


def test_the_corpus_is_the_same_every_time_and_nothing_held_out_is_trained_on(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("again", 0), ("other", 1)):
        lego.write_lego(tmp_path / name, links=3, documents=300, held_out=60, seed=seed)
    files = sorted(file.relative_to(tmp_path / "a") for file in (tmp_path / "a").rglob("*.json*"))
    assert len(files) == 7
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files)
    tokenizer = Tokenizer.from_file(str(tmp_path / "a" / "tokenizer.json"))
    for number, skill in enumerate(lego.skills(3), 1):
        trained, held_out = set(read(tmp_path / "a", skill, "train")), set(read(tmp_path / "a", skill, "held_out"))
        assert (len(trained), len(held_out)) == (300, 60)
        assert not trained & held_out
        assert held_out != set(read(tmp_path / "other", skill, "held_out"))
        assert {solved(chain) for chain, _ in trained} == {(0, number), (1, number)}
        for chain, answer in held_out:
            assert str(solved(chain)[0]) == answer
            tokens = tokenizer.encode(f"{chain} {answer}").tokens
            assert len(tokens) == lego.tokens(3)
            assert "<unknown>" not in tokens
    with pytest.raises(ValueError, match="2,880 chains of 3, 3,001 asked"):
        lego.write_lego(tmp_path / "more", links=3, documents=3000, held_out=1, seed=0)


def test_learning_rates_are_tuned_apart_and_no_run_is_made_twice(tmp_path: Path) -> None:
    made: list[Trial] = []

    def train(trial: Trial) -> dict[str, Any]:
        made.append(trial)
        loss = abs(trial.lr - {"a": 2.0, "b": 3.0}[trial.arm]) + trial.seed
        return {"val_loss": {"x": loss, "y": loss}, "cpu_s": 0.0}

    def run(settings: dict[str, Any]) -> dict[str, Any]:
        return Experiment(tmp_path, settings, train, lambda line: None).run(["a", "b"], [1.0, 2.0, 4.0], [1, 2])

    found = run({"steps": 5})
    assert [found[arm]["lr"] for arm in "ab"] == [2.0, 2.0]
    assert [run["seed"] for run in found["b"]["runs"]] == [1, 2]
    assert [trial.seed for trial in made] == [TUNING_SEED] * 6 + [1, 1, 2, 2]
    assert run({"steps": 5}) == found
    assert len(made) == 10
    run({"steps": 6})
    assert len(made) == 20


def test_the_arms_of_the_paper() -> None:
    names, settings = lego.skills(4), skill_it.FULL
    assert skill_it.static_weights("random", names) == dict(zip(names, [1, 1, 3, 5], strict=True))
    stages = skill_it.policy("anti_curriculum", settings, names)["options"]["stages"]
    assert [stage["from_share"] for stage in stages] == [0, 0.125, 0.25, 0.375, 0.5]
    assert [list(stage["weights"]) for stage in stages] == [[names[3]], [names[2]], [names[1]], [names[0]], names]
    graph = skill_it.policy("skill_it", settings, names)["options"]["graph"]
    assert graph == {"skill_2": {"skill_1": 0.5, "skill_3": 0.5, "skill_4": 0.5}}


@pytest.mark.parametrize("name", ["lego", "real_text"])
def test_tables_and_pictures_come_from_the_stored_results(name: str, tmp_path: Path) -> None:
    result = json.loads((RESULTS / f"mixing_{name}.json").read_text())
    head, rows = report.lego_table(result) if name == "lego" else report.text_table(result)
    assert {row[0].strip("`") for row in rows} == set(result["arms"])
    assert all(len(row) == len(head) for row in rows)
    for arm in result["arms"].values():
        assert [run["seed"] for run in arm["runs"]] == result["settings"]["seeds"]
        assert arm["lr"] in result["settings"]["learning_rates"]
    tokens = {run["tokens"] for arm in result["arms"].values() for run in arm["runs"]}
    assert max(tokens) <= 1.02 * min(tokens)  # sequences are as many; a document's first token is no target
    plot = report.plot_lego if name == "lego" else report.plot_real_text
    plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_differences_are_between_runs_of_one_seed() -> None:
    def runs(*losses: float) -> dict[str, Any]:
        return {"runs": [{"seed": seed, "val_loss": {"x": loss}} for seed, loss in enumerate(losses)]}

    result = {"arms": {"a": runs(1.0, 3.0), "b": {"runs": runs(2.0, 2.0)["runs"][::-1]}}}
    assert report.differences(result, "a", "b", report.loss) == [-1.0, 1.0]
    assert report.spread([1.0, 3.0]) == (2.0, 1.0)


@pytest.mark.slow
def test_an_experiment_runs_to_its_table_and_goes_on_where_it_was(tmp_path: Path) -> None:
    out = tmp_path / "lego.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.mixing.skill_it",
        "--quick",
        "--work",
        str(tmp_path),
        "--out",
        str(out),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skill_it_own" in done.stdout
    result = json.loads(out.read_text())
    run = result["arms"]["curriculum"]["runs"][0]
    # Half of the run is one skill after the other, 1/8 each: equal shares in all.
    assert set(run["shares"]) == set(lego.skills(4))
    assert set(run["accuracy"]) == set(run["val_loss"]) == set(lego.skills(4))
    assert run["mixtures"][0][1]["skill_1"] == 1.0
    assert set(result["own_graph"]) == set(lego.skills(4))
    kept = (tmp_path / "runs.jsonl").read_text()
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert (tmp_path / "runs.jsonl").read_text() == kept
    assert json.loads(out.read_text())["arms"] == result["arms"]
