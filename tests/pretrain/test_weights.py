"""Names and shapes of weights from arithmetic are those of the real model, in its order."""

from typing import Any

import pytest
from process_group import run_ranks
from tiny_run import VOCAB, tiny_config, tiny_state

from parallel import process_groups
from parallel.layout import Layout
from parallel.parameter_names import parameter_names
from pretrain.models.weights import weight_names, weights

EXPERTS = {"num_experts": 4, "moe_ffn_hidden_size": 48, "moe_shared_ffn_hidden_size": 32, "micro_batch_size": 1}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "wonton": ("wonton", {"tie_embeddings": True}),
    "qwen3": ("qwen3", {"head_size": 24}),
    "heads": ("llama", {"mtp": {"depth": 2}}),
    "experts": ("llama", EXPERTS),
}
Found = list[tuple[str, tuple[int, ...]]]


def built(name: str, layout: Layout) -> list[Found]:
    """(name, shape) of the parameters of each chunk of this rank."""
    family, changes = MODELS[name]
    state = tiny_state(tiny_config(family, **changes), layout)
    found = [[(n, tuple(p.shape)) for p, n in parameter_names([chunk]).items()] for chunk in state.chunks]
    if layout.world_size == 1:
        process_groups.shutdown()
    return found


def counted(name: str, layout: Layout, stage: int) -> list[Found]:
    family, changes = MODELS[name]
    model = tiny_config(family, **changes).model
    chunks = range(layout.model_chunks)
    return [[(w.name, w.shape) for w in weights(model, VOCAB, layout, stage, chunk)] for chunk in chunks]


@pytest.mark.parametrize("name", MODELS)
def test_one_process(name: str) -> None:
    [found] = built(name, Layout(1))
    assert found == counted(name, Layout(1), 0)[0]
    family, changes = MODELS[name]
    assert weight_names(tiny_config(family, **changes).model) == [each for each, _ in found]


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("wonton", Layout(2, pipeline_parallel_size=2, virtual_pipeline_parallel_size=2)),
        ("qwen3", Layout(2, tensor_parallel_size=2)),
        ("heads", Layout(2, pipeline_parallel_size=2)),
        ("experts", Layout(2, expert_parallel_size=2)),
    ],
    ids=lambda value: str(value),
)
def test_two_processes(name: str, layout: Layout) -> None:
    for rank, found in enumerate(run_ranks(2, built, name, layout, timeout_s=120)):
        assert found == counted(name, layout, layout.coordinates(rank)[0])
