from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from data_scheduler.prep.config import PrepConfig
from data_scheduler.prep.load import load_prep_config
from headrace.errors import ConfigError
from headrace.yaml_file import parse_yaml
from pretrain.config import RunConfig, config_schema, dump_config, load_config

GOOD: dict[str, Any] = {
    "run": {"dir": "runs/x"},
    "model": {
        "family": "llama", "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 128,
    },
    "data": {"tokenizer": "t", "sources": [{"name": "web", "paths": ["a.jsonl"]}, {"name": "code", "paths": ["b"]}]},
    "train": {"steps": 10},
}  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(GOOD))
    return file


def test_overrides_reach_any_key(path: Path) -> None:
    config = load_config(
        path,
        ["train.steps=7", "optimizer.lr=3e-4", "data.sources.code.weight=2", "data.sources.0.paths=[x, y]",
         "metrics.wandb.enabled=true", "run.name="],
    )  # fmt: skip
    assert (config.train.steps, config.optimizer.lr) == (7, 3e-4)
    assert config.data.sources[1].weight == 2
    assert config.data.sources[0].paths == ["x", "y"]
    assert config.metrics.wandb.enabled


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stpes=5", "unknown key train.stpes (did you mean 'steps'?)"),
        ("model.num_layer=5", "unknown key model.num_layer (did you mean 'num_layers'?)"),
        ("metrics.wandb.projct=x", "unknown key metrics.wandb.projct (did you mean 'project'?)"),
        ("data.sources.web.wieght=1", "unknown key data.sources.web.wieght (did you mean 'weight'?)"),
        ("data.sources.wbe.weight=1", "no item 'wbe' in data.sources; it has web, code"),
        ("trian.steps=5", "unknown key trian (did you mean 'train'?)"),
        ("train.steps=many", "train.steps: input should be a valid integer, got 'many'"),
        ("train.steps=0", "train.steps: input should be greater than or equal to 1, got 0"),
        ("train.steps=1.5", "train.steps"),
        ("model.family=gpt", "model.family: input should be 'wonton', 'llama' or 'qwen3', got 'gpt'"),
        ("train.steps", "write key.path=value"),
        ("train.steps.more=1", "train.steps is a single value, not a section"),
        ("train.steps=[", "the value is not valid YAML"),
        ("data.sources.web.weight=-1", "data.sources.web.weight"),
        ("data.sources.web.name=code", "source name used twice: code"),
        ("optimizer.lr=.inf", "optimizer.lr: input should be a finite number"),
        ("run.dir=", "run.dir: string should have at least 1 character"),
    ],
)
def test_mistakes_name_the_key_and_what_to_do(path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.precision=fp16", "model.num_experts does not go with train.precision: fp16"),
        ("train.selection={kind: rho1}", "train.selection: a step of it holds padding"),
    ],
)
def test_what_does_not_go_with_experts(path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(path, ["model.num_experts=4", override])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not found"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        load_config(tmp_path)
    (tmp_path / "bad.yaml").write_text("run: {dir: x\nmodel: [")
    with pytest.raises(ConfigError, match=r"bad.yaml:\d+:\d+: not valid YAML"):
        load_config(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match="expected a mapping with keys of: run, model"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "bin.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a text file in UTF-8"):
        load_config(tmp_path / "bin.yaml")


def test_what_is_dumped_reads_back_equal(path: Path, tmp_path: Path) -> None:
    config = load_config(path, ["optimizer.lr=1.2345678901234567e-3", "optimizer.eps=1e-10", "run.name='1e5'"])
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config


def test_the_schema_describes_the_config() -> None:
    schema = parse_yaml(config_schema())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(GOOD, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(GOOD | {"extra": 1}, schema)


def test_every_recipe_is_valid() -> None:
    recipes = sorted(Path("recipes").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        load, kind = (load_prep_config, PrepConfig) if recipe.name.startswith("prep_") else (load_config, RunConfig)
        assert isinstance(load(recipe), kind)
