"""The published sizes are the sizes their names say."""

import pytest

from parallel.layout import Layout, Shape, find_problem
from pretrain.models.presets import PRESETS
from pretrain.models.sizes import count_parameters, query_groups

PARAMETERS = {  # billions; the llamas' from their model cards
    "wonton-1.5b": 1.5,
    "wonton-2.7b": 2.7,
    "wonton-6.7b": 7.0,
    "llama-1b": 1.236,
    "llama-3b": 3.213,
    "llama-8b": 8.030,
}


@pytest.mark.parametrize("name", PRESETS)
def test_size_and_room_for_tensor_parallel(name: str) -> None:
    config = PRESETS[name]
    assert config.vocab_size is not None
    assert count_parameters(config, config.vocab_size) / 1e9 == pytest.approx(PARAMETERS[name], rel=0.02)
    shape = Shape(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=query_groups(config),
        ffn_hidden_size=config.ffn_hidden_size,
        vocab_size=config.vocab_size,
        seq_len=2048,
        global_batch_size=240,
        micro_batch_size=1,
        lanes=240,
    )
    assert find_problem(Layout(8, tensor_parallel_size=4, sequence_parallel=True), shape) is None
