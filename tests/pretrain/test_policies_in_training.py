"""Policies that live on held-out losses, in whole runs: the trainer measures them when they are wanted, and a killed
run goes on as if it had not been. The skills graph from runs, and by making them."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import child_process
import pytest
from process_group import run_ranks
from typer.testing import CliRunner

from data_scheduler import DataConfig, Journal, batch_sha256
from data_scheduler.replay import replay
from headrace.errors import ConfigError
from pretrain import loop
from pretrain.cli import app
from pretrain.config import RunConfig, dump_config, validate_config
from pretrain.metrics import read_records
from pretrain.skills_graph import SingleSourceRun, estimate_graph, read_run
from pretrain.train import train

Make = Callable[..., DataConfig]
STEPS = 14


def run_config(
    data_config: Make, folder: Path, policy: dict[str, Any], steps: int = STEPS, sources: int = 3
) -> RunConfig:
    data = data_config(seq_len=32, global_batch_size=8, lanes=8, prefetch=1).model_dump()
    data["sources"] = [source | {"val_paths": source["paths"], "weight": 1.0} for source in data["sources"][:sources]]
    model = {"family": "llama", "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 64}
    raw = {
        "run": {"dir": str(folder)},
        "model": model,
        "data": data | {"policy": policy},
        "train": {"steps": steps, "micro_batch_size": 4, "eval_sequences": 2, "threads": 1},
        "optimizer": {"lr": 1e-2},
        "checkpoint": {"every": 3},
        "metrics": {"progress": False},
    }
    return validate_config(raw, "test")


def run_to_end(config: RunConfig) -> int:
    return child_process.run(lambda: train(config), Path(config.run.dir).with_suffix(".log"))


def told(config: RunConfig) -> tuple[list[str], list[int], dict[int, dict[str, float]]]:
    """(hash of every batch, steps with an evaluation, mixtures that the policy set)."""
    records = list(read_records(Path(config.run.dir) / "metrics.jsonl"))
    journal = Journal(Path(config.run.dir) / "journal.jsonl", writable=False)
    mixtures = {event.step: event.data["weights"] for event in journal.of("mixture")}
    hashes = [record["batch_sha256"] for record in records if "batch_sha256" in record]
    return hashes, [record["step"] for record in records if "val_loss" in record], mixtures


@pytest.mark.slow
def test_held_out_losses_reach_the_policy_when_it_wants_them_and_after_a_kill(
    data_config: Make, tmp_path: Path
) -> None:
    # Three sources: turns of one step at 0, 1, 2 and 6, 7, 8, 12, 13, …; measured at 0…3, 6…9, 12, 13, and at the end.
    options = {"turn_steps": 1, "sweeps": 1, "round_steps": 6, "own_share": 0.6, "eta": 5.0}
    policy = {"kind": "aioli", "options": options, "horizon": 2}
    whole = run_config(data_config, tmp_path / "whole", policy)
    assert run_to_end(whole) == 0
    hashes, measured, mixtures = told(whole)
    assert measured == [0, 1, 2, 3, 6, 7, 8, 9, 12, 13, 14]
    assert len(hashes) == STEPS
    # The losses measured before step 3 are heard by step 5.
    assert max(mixtures[5].values()) > 0.34
    assert mixtures[5] != mixtures[11]

    killed = run_config(data_config, tmp_path / "killed", policy)

    def die_at_ten() -> int:
        original = loop.Run._step

        def step(self: loop.Run, *given: Any) -> None:
            if self.done.step == 10:
                os._exit(9)
            original(self, *given)

        loop.Run._step = step  # type: ignore[method-assign]
        return train(killed)

    # The checkpoint at 9 holds the evaluation at 9, which is told with the report of step 9.
    assert child_process.run(die_at_ten, tmp_path / "killed.log") == 9
    assert run_to_end(killed) == 0
    assert told(killed) == (hashes, measured, mixtures)


def test_a_graph_is_the_part_of_the_loss_that_went() -> None:
    runs = [
        SingleSourceRun("a", 5, {"a": 4.0, "b": 5.0, "x": 1.0}, {"a": 2.0, "b": 4.5, "x": 1.0}),
        SingleSourceRun("b", 5, {"a": 4.0, "b": 5.0}, {"a": 4.4, "b": 2.0}),
    ]
    # a: (4 − 2)/4 = 0.5, (5 − 4.5)/5 = 0.1; b: a rose, so 0; (5 − 2)/5 = 0.6
    assert estimate_graph(runs)["graph"] == [[0.5, pytest.approx(0.1)], [0.0, 0.6]]
    assert estimate_graph(runs, 0.2)["graph"] == [[0.5, 0.0], [0.0, 0.6]]
    for wrong, message in [
        ([runs[0], runs[0]], "two runs were trained on 'a'"),
        ([runs[0], runs[1]._replace(steps=6)], "5, 6 steps"),
        ([runs[0], runs[1]._replace(after={"b": 2.0})], "no held-out loss of 'a'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            estimate_graph(wrong)


def test_runs_that_are_no_part_of_a_graph_are_named(tmp_path: Path) -> None:
    def written(*records: dict[str, Any]) -> Path:
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return tmp_path

    both = {"step": 0, "source_tokens": {"a": 1, "b": 1}}
    one = {"step": 0, "source_tokens": {"a": 1}}
    with pytest.raises(ConfigError, match="trained on a, b"):
        read_run(written(both))
    with pytest.raises(ConfigError, match="set val_paths"):
        read_run(written(one, {"step": 0, "val_loss": {"a": 1.0}}))
    with pytest.raises(ConfigError, match=r"no metrics\.jsonl"):
        read_run(tmp_path / "nowhere")


@pytest.mark.slow
def test_estimate_graph_makes_the_runs_and_skill_it_takes_the_graph(data_config: Make, tmp_path: Path) -> None:
    config = run_config(data_config, tmp_path / "unused", {"kind": "odm", "guard": {"min_share": 0.1}}, sources=2)
    (tmp_path / "run.yaml").write_text(dump_config(config))
    graph, runner = tmp_path / "graph.json", CliRunner()
    command = ["mix", "estimate-graph", "--config", str(tmp_path / "run.yaml"), "--steps", "4", "--out", str(graph)]
    made = runner.invoke(app, command)
    assert made.exit_code == 0, made.output
    found = json.loads(graph.read_text())
    assert found["sources"] == ["a", "b"]
    assert found["steps"] == 4
    assert all(0 < found["graph"][number][number] < 1 for number in range(2))
    runs = [str(tmp_path / "graph.runs" / name) for name in "ab"]
    again = runner.invoke(app, ["mix", "estimate-graph", *runs, "--out", str(tmp_path / "again.json")])
    assert again.exit_code == 0, again.output
    assert json.loads((tmp_path / "again.json").read_text()) == found
    policy = {"kind": "skill_it", "options": {"graph": str(graph), "round_steps": 2}, "horizon": 2}
    learned = run_config(data_config, tmp_path / "learned", policy, steps=6, sources=2)
    assert run_to_end(learned) == 0
    _, measured, mixtures = told(learned)
    assert measured == [0, 2, 4, 6]
    assert len(mixtures) > 1
    journal = Journal(tmp_path / "learned" / "journal.jsonl", writable=False)
    assert journal.of("policy_input")[0].data["value"] == {"sources": found["sources"], "graph": found["graph"]}


def test_estimate_graph_says_what_to_give(tmp_path: Path) -> None:
    for arguments in ([], ["--config", "x.yaml"], ["run", "--config", "x.yaml", "--steps", "3"]):
        with pytest.raises(ConfigError, match="give finished runs, or --config with --steps"):
            CliRunner().invoke(app, ["mix", "estimate-graph", *arguments], catch_exceptions=False)


def go(config: RunConfig) -> int:
    return int(train(config))


@pytest.mark.multiprocess
@pytest.mark.slow
def test_ranks_decide_alike_and_the_journal_replays_them(data_config: Make, tmp_path: Path) -> None:
    """Two ranks plan for themselves from the same reports: what both drew is what rank 0's journal says."""
    line = {"step": 0, "source_loss": dict.fromkeys("abc", 5.0), "source_tokens": dict.fromkeys("abc", 9)}
    (tmp_path / "reference.jsonl").write_text(json.dumps(line) + "\n")
    options = {"reference": str(tmp_path / "reference.jsonl"), "eta": 2.0}
    policy = {"kind": "doremi", "options": options, "horizon": 2, "guard": {"min_share": 0.05}}
    config = run_config(data_config, tmp_path / "run", policy, steps=8)
    assert run_ranks(2, go, config) == [0, 0]
    hashes, _, mixtures = told(config)
    assert len(mixtures) > 3
    assert [batch_sha256(batch.digests) for batch in replay(config.run.dir, 0, 7)] == hashes
