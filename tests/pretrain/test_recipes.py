"""Every preset's recipe: what its dry run says, and three real steps of it scaled down."""

import json
import re
from pathlib import Path
from typing import Any

import child_process
import pytest
from process_group import run_ranks
from typer.testing import CliRunner

from headrace.errors import ConfigError, LayoutError
from pretrain.cli import app
from pretrain.config import RunConfig, load_config
from pretrain.dry_run import as_text, describe
from pretrain.metrics import read_records
from pretrain.models.presets import PRESETS
from pretrain.train import train

RECIPES = Path(__file__).parents[2] / "recipes"
EXPECTED = {  # processes, layout, parameters, tokens of the run, GB of the fullest rank
    "llama_1b": (8, "dp=8 tp=1 pp=1", 1_235_814_400, 1.0e11, 30.6),
    "llama_3b": (32, "dp=32 tp=1 pp=1", 3_212_749_824, 3.0e11, 38.8),
    "llama_8b": (64, "dp=32 tp=2+sp pp=1", 8_030_261_248, 1.0e12, 36.9),
    "qwen3_0.6b": (8, "dp=8 tp=1 pp=1", 596_049_920, 5.0e10, 26.1),
    "qwen3_1.7b": (16, "dp=16 tp=1 pp=1", 1_720_574_976, 1.0e11, 42.2),
    "qwen3_4b": (32, "dp=32 tp=1 pp=1", 4_022_468_096, 3.0e11, 38.2),
    "qwen3_8b": (64, "dp=32 tp=2+sp pp=1", 8_190_735_360, 5.0e11, 40.5),
    "wonton_1.5b": (8, "dp=8 tp=1 pp=1", 1_636_546_688, 3.0e11, 37.7),
    "wonton_2.7b": (16, "dp=16 tp=1 pp=1", 3_233_321_984, 3.0e11, 53.1),
    "wonton_6.7b": (64, "dp=32 tp=2+sp pp=1", 7_589_224_448, 3.0e11, 47.1),
}
TWO_PROCESSES = "wonton_6.7b"


def recipe(name: str) -> Path:
    return RECIPES / f"{name}.yaml"


def test_every_preset_has_a_recipe() -> None:
    assert {name.replace("-", "_") for name in PRESETS} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_what_a_dry_run_says(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a developer may have made data/ in the project's folder
    processes, layout, parameters, tokens, memory = EXPECTED[name]
    assert f"--dry-run --world-size {processes}\n" in recipe(name).read_text()
    plan = describe(load_config(recipe(name)), processes)
    assert (plan["layout"]["text"], plan["parameters"]["total"]) == (layout, parameters)
    assert plan["tokens"] == pytest.approx(tokens, rel=1e-3)
    assert max(stage["total"] for stage in plan["memory"]) / 1e9 == pytest.approx(memory, abs=0.1)
    assert memory < 70  # of 80 GB; what is not counted needs some
    assert plan["learning_rate"]["end"] < 0.11 * plan["learning_rate"]["peak"]
    text = as_text(plan)
    assert f"{parameters:,}" in text
    assert layout in text
    assert f"{memory:.1f}"[:-1] in text.partition("missing")[0].rpartition("\n")[0].split()[-1]
    assert "data.tokenizer: nothing at data/tokenizer" in text
    assert json.loads(json.dumps(plan)) == plan


def test_the_arithmetic_of_a_run_in_stages() -> None:
    stages = "stages=[{from_step: 10, seq_len: 2048, global_batch_size: 512, lr_scale: 0.5, rope_base: 2e4}]"
    plan = describe(load_config(recipe("llama_1b"), ["train.steps=30", "optimizer.warmup_steps=2", stages]), 8)
    first, second = plan["batches"]
    assert (first["steps"], second["first_step"], second["steps"]) == (10, 10, 20)
    assert first["micro_batches"] == 256 // 8 // 2
    assert second["micro_batches"] == 512 // 8 // 2
    assert plan["tokens"] == 10 * 256 * 4096 + 20 * 512 * 2048
    assert plan["sequences"] == 10 * 256 + 20 * 512
    # The longer sequences of the first stretch are what decides the memory.
    assert plan["memory"] == describe(load_config(recipe("llama_1b"), ["train.steps=30"]), 8)["memory"]
    assert plan["learning_rate"]["end"] == pytest.approx(3e-5 * 0.5)
    matrices = plan["parameters"]["total"] - 16 * 2 * 2048 - 2048  # all but the norms; the tied head is one
    assert first["flops_per_token"]["full"] == 6 * matrices + 12 * 16 * 2048 * 4096
    assert first["flops_per_token"]["causal"] == 6 * matrices + 6 * 16 * 2048 * 4096


def test_a_stage_with_another_layout_has_its_own_micro_batches() -> None:
    stage = (
        "{from_step: 10, parallel: {tensor_parallel_size: 2}, trainable: ['*'], rope_scaling: {kind: ntk, factor: 2}}"
    )
    overrides = ["train.steps=30", "optimizer.warmup_steps=2", f"stages=[{stage}]", "train.precision=fp16"]
    plan = describe(load_config(recipe("llama_1b"), overrides), 8)
    assert json.loads(json.dumps(plan)) == plan
    first, second = plan["batches"]
    assert (first["micro_batches"], second["micro_batches"]) == (256 // 8 // 2, 256 // 4 // 2)
    assert "tp=2" in as_text(plan)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.num_experts=4", "experts"),
        ("parallel={fully_sharded: true}", "fully sharded"),
    ],
)
def test_what_the_memory_does_not_count_is_said(override: str, said: str) -> None:
    lines = describe(load_config(recipe("llama_1b"), [override]), 8)["missing"]
    assert [line for line in lines if line.startswith(f"memory: {said}")]


def test_without_a_vocabulary_it_says_so(tmp_path: Path, corpus: Path) -> None:
    unknown = ["model.vocab_size=null", f"data.tokenizer={tmp_path}/none"]
    plan = describe(load_config(recipe("llama_1b"), unknown), 8)
    assert plan["model"]["vocab_size"] is None
    assert plan["parameters"]["embedding"] == 0
    assert any("embedding and logits are not counted" in line for line in plan["missing"])
    known = ["model.vocab_size=null", f"data.tokenizer={corpus}/tokenizer.json"]
    plan = describe(load_config(recipe("llama_1b"), known), 8)
    assert plan["model"]["vocab_size"] % 128 == 0
    assert plan["parameters"]["embedding"] == plan["model"]["vocab_size"] * 2048


def test_special_tokens_that_the_tokenizer_lacks_are_known_before(corpus: Path) -> None:
    words = ["model.vocab_size=null", f"data.tokenizer={corpus}/tokenizer.json", "data.objectives=[{kind: ul2}]"]
    with pytest.raises(ConfigError, match="takes up to 23 sentinels"):
        describe(load_config(recipe("llama_1b"), words), 8)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def headrace(*words: str) -> Any:
        return CliRunner().invoke(app, ["train", str(recipe("llama_8b")), f"run.dir={tmp_path}/run", *words])

    shown = headrace("--dry-run", "--world-size", "64")
    assert shown.exit_code == 0
    assert "8,030,261,248" in shown.output
    assert re.search(r"^ +data +32: ranks 0 2 … 62$", shown.output, re.MULTILINE)
    as_json = headrace("--dry-run", "--nproc", "2", "--json", "data.global_batch_size=2", "data.lanes=2")
    assert json.loads(as_json.output)["layout"]["world_size"] == 2
    ranks = headrace("--dry-run", "--nproc", "4", "data.global_batch_size=4", "data.lanes=4")
    assert re.search(r"^ +3 +0 +1 +0 +1$", ranks.output, re.MULTILINE)
    assert not (tmp_path / "run").exists()
    refused = headrace("--dry-run", "--world-size", "3")
    assert isinstance(refused.exception, LayoutError)
    assert "3 processes cannot be split into tensor_parallel_size 2" in str(refused.exception)
    for words in (["--world-size", "2"], ["--json"]):
        assert "belong to --dry-run" in str(headrace(*words).exception)


def scaled_down(name: str, run_dir: Path, corpus: Path) -> RunConfig:
    """The recipe with a small model, small batches and other data; layout of one process, or two for one of them."""
    grouped = PRESETS[name.replace("_", "-")].num_query_groups is not None
    overrides = [
        f"run.dir={run_dir}", "model.num_layers=2", "model.hidden_size=64", "model.num_attention_heads=4",
        "model.ffn_hidden_size=128", "model.vocab_size=512", "train.precision=fp32", "train.steps=3",
        "train.eval_sequences=0", "train.threads=1", "data.seq_len=64", "data.global_batch_size=8", "data.prefetch=0",
        f"data.tokenizer={corpus}/tokenizer.json", "optimizer.warmup_steps=1", "metrics.progress=false",
        *([f"model.num_query_groups={2}"] if grouped else []),
        *(["model.head_size=32"] if name.startswith("qwen3") else []),
        *(f"data.sources.{number}.paths=[{corpus}/{folder}]" for number, folder in enumerate("abd")),
        *(f"data.sources.{number}.val_paths=[]" for number in range(3)),
    ]  # fmt: skip
    if name != TWO_PROCESSES:
        overrides += ["parallel.tensor_parallel_size=1", "parallel.sequence_parallel=false"]
    return load_config(recipe(name), overrides)


@pytest.mark.parametrize("name", EXPECTED)
def test_three_steps_scaled_down(name: str, tmp_path: Path, corpus: Path) -> None:
    config = scaled_down(name, tmp_path / "run", corpus)
    if name == TWO_PROCESSES:
        assert run_ranks(2, train, config, timeout_s=120) == [0, 0]
    else:
        log = tmp_path / "log"
        assert child_process.run(lambda: train(config), log) == 0, log.read_text()
    losses = [record["loss"] for record in read_records(tmp_path / "run" / "metrics.jsonl") if "loss" in record]
    assert len(losses) == 3
    assert losses[2] < losses[0] < 6.5  # ln 512 = 6.24
    assert load_config(tmp_path / "run" / "config.yaml") == config  # whole: no preset is needed to go on
