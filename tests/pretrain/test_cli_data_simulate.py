"""`headrace data simulate`: what a person is told and shown before a run."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_scheduler import DataConfig
from headrace.errors import ConfigError
from pretrain.cli.data_simulate import simulate
from pretrain.config import load_data_config

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG\r\n\x1a\n"


def headrace(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "pretrain", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.fixture
def config(data_config: Callable[..., DataConfig], tmp_path: Path) -> Path:
    """A whole run's configuration; source a may be seen once."""
    data = data_config(lanes=8, global_batch_size=8, cache_dir=str(tmp_path / "cache")).model_dump()
    data["sources"][0]["max_epochs"] = 1
    raw: dict[str, Any] = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {
            "family": "llama", "num_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "ffn_hidden_size": 32,
        },
        "data": data,
        "train": {"steps": 150},
    }  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_a_table_warnings_and_a_plot(config: Path, tmp_path: Path) -> None:
    picture = tmp_path / "plots" / "mixture.png"
    done = headrace("data", "simulate", config, "--out", picture, "data.sources.d.weight=0")
    assert done.returncode == 0, done.stderr
    assert "150 steps of 8 x 64 tokens, policy static" in done.stdout
    assert "tokens in an epoch" in done.stdout
    assert "rest on an estimate of the tokens" in done.stdout
    assert "warning: a: through at step" in done.stdout
    assert "warning: d: weight 0 in every step, nothing is drawn" in done.stdout
    assert "more than 4 from step" in done.stdout
    assert picture.read_bytes().startswith(PNG)
    assert not (tmp_path / "run").exists()


def test_json_for_a_data_section_alone_and_more_steps(config: Path, tmp_path: Path) -> None:
    alone = tmp_path / "data.yaml"
    alone.write_text(yaml.safe_dump({"data": yaml.safe_load(config.read_text())["data"]}))
    assert load_data_config(alone) == (load_data_config(config)[0], None)
    picture = tmp_path / "p.png"
    found = headrace("data", "simulate", alone, "--steps", 40, "--json", "--out", picture)
    assert found.returncode == 0, found.stderr
    simulation = json.loads(found.stdout)
    assert (simulation["steps"], simulation["steps_asked"], simulation["losses"]) == (40, 40, None)
    assert sum(source["sequences"] for source in simulation["sources"]) == 40 * 8
    a = simulation["sources"][0]
    assert a["source"] == "a"
    assert a["tokens"] == a["sequences"] * 65
    assert [len(simulation["points"][key][3]) for key in ("asked", "realised", "epochs")] == [40, 40, 40]
    assert picture.read_bytes().startswith(PNG)


def test_losses_of_an_earlier_run_are_read(config: Path, tmp_path: Path) -> None:
    """`static` does not listen, and that is said; which policies do is tested with the simulation."""
    run = tmp_path / "earlier"
    run.mkdir()
    records = [{"step": n, "loss": 3.0, "source_loss": {"a": 3.0, "b": "NaN"}} for n in range(5)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"torn')
    done = headrace("data", "simulate", config, "--losses", run, "--out", tmp_path / "p.png", "--steps", 3)
    assert done.returncode == 0, done.stderr
    assert "policy 'static' does not listen to losses; those given change nothing" in done.stdout


def test_bad_input_is_one_line(config: Path) -> None:
    for arguments, message in (
        (("data.policy.kind=nope",), "no policy 'nope' (known: "),
        (("--steps", "0"), "--steps"),
    ):
        done = headrace("data", "simulate", config, *arguments)
        assert done.returncode == 2, (arguments, done.stderr)
        assert done.stdout == ""
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_what_is_wrong_is_said(config: Path, tmp_path: Path) -> None:
    alone = tmp_path / "data.yaml"
    alone.write_text(yaml.safe_dump({"data": yaml.safe_load(config.read_text())["data"]}))
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    for path, overrides, options, message in (
        (tmp_path / "none.yaml", [], {}, "none.yaml: file not found"),
        (alone, [], {}, "has no train.steps; give --steps N"),
        (alone, ["data.lanez=3"], {}, "did you mean 'lanes'"),
        (config, ["data.policy={kind: schedule, options: {stages: 3}}"], {}, "data.policy.options of 'schedule'"),
        (config, ["data.sources.b.paths=[/nowhere/at/all]"], {}, "source 'b': no file at /nowhere/at/all"),
        (config, ["data.policy.horizon=1", "data.prefetch=1"], {}, "data.policy.horizon"),
        (config, [], {"losses": tmp_path / "nothing"}, "no metrics.jsonl there"),
        (config, [], {"losses": empty}, "no loss of a, b, c, d there"),
        (config, [], {"out": config / "in-a-file.png"}, "--out"),
    ):
        with pytest.raises(ConfigError) as caught:
            simulate(path, overrides, **options)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
