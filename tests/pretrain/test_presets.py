"""The published sizes are the sizes their names say, and a configuration can start from one by name."""

from typing import Any

import pytest
import yaml

from headrace.errors import ConfigError
from parallel.layout import Layout, Shape, find_problem
from pretrain.checkpoint import model_identity
from pretrain.config import ModelConfig, RunConfig, dump_config, validate_config
from pretrain.models.presets import PRESETS
from pretrain.models.sizes import count_parameters, embedding_parameters, query_groups

PARAMETERS = {  # (total, total without embedding) in billions; those of llama and qwen3 from their model cards
    "wonton-1.5b": (1.64, 1.476),  # GPT-2's of 1.5 B, with an output layer of its own
    "wonton-2.7b": (3.23, 2.518),
    "wonton-6.7b": (7.59, 6.444),
    "llama-1b": (1.236, 0.973),
    "llama-3b": (3.213, 2.819),
    "llama-8b": (8.030, 6.980),
    "qwen3-0.6b": (0.596, 0.44),
    "qwen3-1.7b": (1.721, 1.41),
    "qwen3-4b": (4.022, 3.63),
    "qwen3-8b": (8.191, 6.946),
}


@pytest.mark.parametrize("name", PRESETS)
def test_size_and_room_for_tensor_parallel(name: str) -> None:
    config = PRESETS[name]
    assert config.vocab_size is not None
    total = count_parameters(config, config.vocab_size)
    assert total / 1e9 == pytest.approx(PARAMETERS[name][0], rel=0.01)
    without = total - embedding_parameters(config, config.vocab_size)
    assert without / 1e9 == pytest.approx(PARAMETERS[name][1], rel=0.005)
    shape = Shape(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=query_groups(config),
        head_size=config.head_size,
        ffn_hidden_size=config.ffn_hidden_size,
        vocab_size=config.vocab_size,
        seq_len=2048,
        global_batch_size=240,
        micro_batch_size=1,
        lanes=240,
    )
    problem = find_problem(Layout(8, tensor_parallel_size=4, sequence_parallel=True), shape)
    assert (problem is None) == (name != "wonton-1.5b")  # which has 25 heads


def run_config(model: dict[str, Any]) -> RunConfig:
    data = {"tokenizer": "t", "sources": [{"name": "web", "paths": ["a"]}]}
    return validate_config({"run": {"dir": "r"}, "model": model, "data": data, "train": {"steps": 1}}, "run.yaml")


def test_a_preset_gives_what_is_not_given_beside_it() -> None:
    given = run_config({"preset": "qwen3-0.6b", "num_layers": 2, "head_size": None, "z_loss": 1e-4}).model
    expected = PRESETS["qwen3-0.6b"].model_dump() | {"num_layers": 2, "head_size": None, "z_loss": 1e-4}
    assert given.model_dump() == expected | {"preset": "qwen3-0.6b"}


def test_the_resolved_configuration_is_whole() -> None:
    config = run_config({"preset": "llama-1b", "rope_base": 1e4})
    dumped = yaml.safe_load(dump_config(config))
    assert validate_config(dumped, "dumped") == config
    name = dumped["model"].pop("preset")  # a preset that changed, or went, would change nothing of the run
    assert name == "llama-1b"
    without = validate_config(dumped, "dumped").model
    assert without == config.model.model_copy(update={"preset": None})
    assert model_identity(without, 1, "bf16") == model_identity(config.model, 1, "bf16")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"preset": "llama-2b"}, "model: no preset 'llama-2b' (did you mean 'llama-"),
        ({"preset": "x"}, "model: no preset 'x' (there are wonton-1.5b, wonton-2.7b"),
        ({"preset": 3}, "model.preset: input should be a valid string"),
        ({"preset": "llama-1b", "num_layer": 2}, "unknown key model.num_layer (did you mean 'num_layers'?)"),
        ({"family": "llama"}, "model.num_layers is required"),
    ],
)
def test_mistakes_name_the_key(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run_config(model)
    assert message in str(caught.value)


def test_heads_as_wide_as_they_are_anyway_make_no_other_model() -> None:
    config = PRESETS["llama-1b"]
    said = config.model_copy(update={"head_size": 64})
    assert model_identity(said, 1, "bf16") == model_identity(config, 1, "bf16")
    wider = ModelConfig.model_validate(config.model_dump() | {"head_size": 128})
    assert model_identity(wider, 1, "bf16") != model_identity(config, 1, "bf16")
