"""Sources in bands, in whole runs: per-band losses, a kill, another number of ranks, live sources, the command line."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import child_process
import pytest
import yaml
from process_group import run_ranks
from small_corpus import jsonl, make_documents
from typer.testing import CliRunner

from data_scheduler import DataConfig, Journal, Scheduler, batch_sha256
from data_scheduler.config import SourceConfig
from data_scheduler.replay import ledger, replay, trace
from headrace.errors import ConfigError
from pretrain import loop
from pretrain.cli import app
from pretrain.config import RunConfig, dump_config, load_config, validate_config
from pretrain.control.live import with_live_sources
from pretrain.metrics import read_records
from pretrain.train import train

Make = Callable[..., DataConfig]
STEPS = 12


@pytest.fixture
def graded_run(data_config: Make, tmp_path: Path) -> Callable[[str], RunConfig]:
    """A run on source a in three bands, with held-out documents of the shortest only, and on source c."""
    val = tmp_path / "val.jsonl"
    val.write_bytes(jsonl(sorted(make_documents("v", 30, 0), key=len)[:10]))

    def make(name: str) -> RunConfig:
        data = data_config(seq_len=32, global_batch_size=8, lanes=8, prefetch=1).model_dump()
        data["sources"] = [data["sources"][0], data["sources"][2]]
        data["sources"][0] |= {"bands": {"by": "length", "count": 3}, "val_paths": [str(val)]}
        data["policy"] = {"kind": "pacing", "options": {"function": "step", "replay": 0.2}}
        raw = {
            "run": {"dir": str(tmp_path / name)},
            "model": {
                "family": "llama", "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 64
            },
            "data": data,
            "train": {"steps": STEPS, "micro_batch_size": 4, "eval_sequences": 2, "threads": 1},
            "checkpoint": {"every": 3},
            "metrics": {"progress": False},
        }  # fmt: skip
        return validate_config(raw, "test")

    return make


def hashes(config: RunConfig) -> list[str]:
    records = read_records(Path(config.run.dir) / "metrics.jsonl")
    return [record["batch_sha256"] for record in records if "batch_sha256" in record]


def go(config: RunConfig) -> int:
    return int(train(config))


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_curriculum_goes_on_after_a_kill_with_another_number_of_ranks(
    graded_run: Callable[[str], RunConfig], tmp_path: Path
) -> None:
    whole = graded_run("whole")
    assert child_process.run(lambda: go(whole), tmp_path / "whole.log") == 0
    records = list(read_records(tmp_path / "whole" / "metrics.jsonl"))
    steps = [set(record["source_tokens"]) for record in records if "source_tokens" in record]
    assert steps[0] == steps[3] == {"a.1", "c"}
    assert steps[4] | steps[5] | steps[6] == {"a.1", "a.2", "c"}
    assert set().union(*steps[8:]) == {"a.1", "a.2", "a.3", "c"}
    # What the held-out files hold nothing of has no held-out loss.
    assert {name for record in records for name in record.get("val_loss", {})} == {"a.1"}

    killed = graded_run("killed")

    def die_at_seven() -> int:
        original = loop.Run._step

        def step(self: loop.Run, *given: Any) -> None:
            if self.done.step == 7:
                os._exit(9)
            original(self, *given)

        loop.Run._step = step  # type: ignore[method-assign]
        return go(killed)

    assert child_process.run(die_at_seven, tmp_path / "killed.log") == 9
    # The configuration that the run wrote has the bands in the place of `bands`; both go on with it.
    written = load_config(tmp_path / "killed" / "config.yaml")
    assert [source.name for source in written.data.sources] == ["a.1", "a.2", "a.3", "c"]
    again = written.model_copy(update={"train": written.train.model_copy(update={"steps": STEPS})})
    assert run_ranks(2, go, again) == [0, 0]
    assert hashes(killed) == hashes(whole)
    assert [batch_sha256(batch.digests) for batch in replay(killed.run.dir, 0, STEPS - 1)] == hashes(whole)
    _, rows = ledger(killed.run.dir)
    assert [row.source for row in rows] == ["a.1", "a.2", "a.3", "c"]
    assert {document.source for document in trace(killed.run.dir, 0)} == {"a.1", "c"}


def test_live_sources_stand_after_the_bands_of_those_before_them(
    graded_run: Callable[[str], RunConfig], tmp_path: Path
) -> None:
    config = graded_run("run")
    scheduler = Scheduler(config.data, run_dir=tmp_path / "run", run_steps=STEPS)
    live = {"name": "e", "paths": config.data.sources[1].paths}
    data = {"source": SourceConfig.model_validate(live).model_dump(mode="json"), "command": "x"}
    scheduler.journal.append("source_added", 3, data, "user:ada")
    more = {"name": "f", "paths": live["paths"]}
    sources = [*config.data.sources, SourceConfig.model_validate(more)]
    config = config.model_copy(update={"data": config.data.model_copy(update={"sources": sources})})
    assert [source.name for source in with_live_sources(config).data.sources] == ["a.1", "a.2", "a.3", "c", "e", "f"]


def test_the_command_line_knows_bands(graded_run: Callable[[str], RunConfig], tmp_path: Path) -> None:
    path, runner = tmp_path / "run.yaml", CliRunner()
    path.write_text(dump_config(graded_run("run")))
    shown = runner.invoke(app, ["data", "simulate", str(path), "--out", str(tmp_path / "x.png"), "--json"])
    assert shown.exit_code == 0, shown.output
    found = yaml.safe_load(shown.stdout)["sources"]
    assert [source["source"] for source in found] == ["a.1", "a.2", "a.3", "c"]
    # a has two thirds; the third band is drawn in the last third of the run only, and gets 0.8 of it there
    assert found[2]["share_asked"] == pytest.approx(2 / 3 * 0.8 / 3, abs=1e-6)
    shown = runner.invoke(app, ["data", "index", str(path), "--json"])
    assert shown.exit_code == 0, shown.output
    assert [source["source"] for source in yaml.safe_load(shown.stdout)["sources"]] == ["a.1", "a.2", "a.3", "c"]
    for key, value, said in [
        ("bands.by", "quality", "no record has a number in 'quality' \\(fields: text\\)"),
        ("bands", "{by: length, count: 1}", "bands.count: input should be greater than or equal to 2, got 1"),
        ("bands", "{by: length, edges: [9, 3]}", "edges must ascend, got 9, 3"),
    ]:
        with pytest.raises(ConfigError, match=said) as error:
            runner.invoke(app, ["data", "simulate", str(path), f"data.sources.a.{key}={value}"], catch_exceptions=False)
        assert "\n" not in str(error.value)


def test_the_journal_alone_knows_the_edges(graded_run: Callable[[str], RunConfig], tmp_path: Path) -> None:
    Scheduler(graded_run("run").data, run_dir=tmp_path / "run", run_steps=STEPS)
    sources = Journal(tmp_path / "run" / "journal.jsonl", writable=False).events[0].data["data"]["sources"]
    assert [source["band"]["number"] for source in sources[:3]] == [1, 2, 3]
    assert len({tuple(source["band"]["edges"]) for source in sources[:3]}) == 1
    assert all(source["bands"] is None for source in sources)
