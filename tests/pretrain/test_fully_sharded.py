"""Fully sharded data parallelism: one process's curve, a share of the memory, checkpoints that anything can load."""

import functools
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from process_group import run_ranks
from tiny_run import BATCH, SEQ_LEN, tiny_batch, tiny_config, tiny_state, tiny_steps

from data_scheduler.state import State
from headrace.errors import ConfigError, LayoutError
from parallel import process_groups
from parallel.layout import Layout, validate
from pretrain import checkpoint
from pretrain.checkpoint import Checkpoints, Progress
from pretrain.config import RunConfig, validate_config
from pretrain.layouts import layout_from
from pretrain.models.sizes import layout_shape
from pretrain.step import TrainState, evaluate_step, train_step

sharded = functools.partial(Layout, fully_sharded=True)
REDUCE_SCATTERS = ("reduce_scatter_single", "reduce_scatter_tensor")
UNEVEN = {"hidden_size": 72, "ffn_hidden_size": 99}
"""Over 4 ranks the gated MLP's 2 x 99 rows are cut into 50 + 50 + 50 + 48: the second rank has some of both halves."""

CURVES: dict[str, tuple[Layout, str, dict[str, Any]]] = {
    "one process": (sharded(1), "llama", {}),
    "dp2": (sharded(2), "wonton", {}),
    "cp2": (sharded(2, context_parallel_size=2), "llama", {}),
    "dp2 tied": (sharded(2), "qwen3", {"tie_embeddings": True, "z_loss": 1e-2}),
    "dp2 recomputed": (sharded(2), "llama", {"recompute": "full"}),
    "dp4 uneven": (sharded(4), "llama", UNEVEN),
    "dp2 tp2+sp": (sharded(4, tensor_parallel_size=2, sequence_parallel=True), "wonton", {}),
    "dp2 pp2": (sharded(4, pipeline_parallel_size=2), "llama", {}),
    "dp2 pp2 interleaved tied": (
        sharded(4, pipeline_parallel_size=2, virtual_pipeline_parallel_size=2),
        "qwen3",
        {"tie_embeddings": True},
    ),
}


@functools.cache
def single_process(text: str, steps: int = 5) -> list[tuple[float, float]]:
    results = tiny_steps(RunConfig.model_validate_json(text), Layout(1), steps)
    return [(result.loss, result.grad_norm) for result in results]


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", CURVES)
def test_every_layout_has_the_single_process_curve(name: str) -> None:
    layout, family, changes = CURVES[name]
    config = tiny_config(family, micro_batch_size=1, **changes)  # 8, 4 or 2 micro-batches a step
    ranks = run_ranks(layout.world_size, tiny_steps, config, layout, timeout_s=120)
    for results in ranks:
        for result, reference in zip(results, single_process(config.model_dump_json()), strict=True):
            assert (result.loss, result.grad_norm) == pytest.approx(reference, rel=1e-5)


@pytest.mark.multiprocess
def test_bf16_stays_near_whole_weights_in_bf16() -> None:
    config = tiny_config("llama", micro_batch_size=1, precision="bf16")
    results = run_ranks(2, tiny_steps, config, sharded(2), timeout_s=120)[0]
    fp32 = single_process(tiny_config("llama", micro_batch_size=1).model_dump_json())
    for result, whole, exact in zip(results, single_process(config.model_dump_json()), fp32, strict=True):
        assert result.loss == pytest.approx(whole[0], rel=1e-4)
        assert result.grad_norm == pytest.approx(whole[1], rel=1e-2)
        assert result.loss != exact[0]


def step_once(state: TrainState, step: int = 0) -> tuple[float, float]:
    size = state.config.train.micro_batch_size
    result = train_step(state, tiny_batch(step, state.ranks.dp_rank, state.ranks.dp_size, size), 1e-3)
    return result.loss, result.grad_norm


@pytest.mark.multiprocess
def test_a_rank_holds_its_share_of_weights_gradients_and_optimizer_state() -> None:
    config = tiny_config("llama")

    def bytes_per_byte_of_weights(layout: Layout) -> float:
        before = storages()
        state = tiny_state(config, layout)
        weights = sum(parameter.numel() * 4 for parameter in state.chunks[0].parameters())
        step_once(state)
        evaluate_step(state, tiny_batch(0, state.ranks.dp_rank, 2))
        gc.collect()
        held = storages()
        return sum(size for storage, size in held.items() if storage not in before) / weights

    for rank in run_ranks(2, bytes_per_byte_of_weights, Layout(2)):
        assert rank > 3.9  # weights, gradients, two moments
    for rank in run_ranks(2, bytes_per_byte_of_weights, sharded(2)):
        assert 1.9 < rank < 2.1


def counting(function: Callable[..., Any], found: list[int], at: int) -> Callable[..., Any]:
    def call(*args: Any, **named: Any) -> Any:
        found[at] += 1
        return function(*args, **named)

    return call


def storages() -> dict[int, int]:
    """Bytes of the memory of every tensor there is, by address."""
    found = {}
    for value in gc.get_objects():
        if issubclass(type(value), torch.Tensor):
            local = getattr(value, "_local_tensor", value)
            found[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return found


@pytest.mark.multiprocess
@pytest.mark.parametrize(("reduce", "tied"), [("step", False), ("step", True), ("micro_batch", False)])
def test_a_step_reduces_and_gathers_as_often_as_it_must(reduce: str, tied: bool) -> None:
    config = reducing(tiny_config("llama", micro_batch_size=1, tie_embeddings=tied), reduce)

    def count() -> tuple[int, int]:
        state = tiny_state(config, layout_from(config.parallel, 2))
        step_once(state)
        found = [0, 0]
        # What torch's FSDP calls; the second names are those of torch before 2.13.
        for at, names in enumerate((("all_gather_single", "all_gather_into_tensor"), REDUCE_SCATTERS)):
            name = next(name for name in names if hasattr(dist, name))
            setattr(dist, name, counting(getattr(dist, name), found, at))
        step_once(state, 1)
        return found[0], found[1]

    layers, micro_batches, others = 4, 4, 1 if tied else 3  # the final norm; an embedding and a head of their own
    gathered = micro_batches * (others + 2 * layers)  # only layers are gathered again for the backward pass
    reduced = (layers + others) * (1 if reduce == "step" else micro_batches)
    assert run_ranks(2, count, timeout_s=120) == [(gathered, reduced)] * 2


@pytest.mark.multiprocess
def test_reducing_after_every_micro_batch_changes_rounding_only() -> None:
    config = tiny_config("llama", micro_batch_size=1)
    layout = layout_from(reducing(config, "micro_batch").parallel, 2)
    assert layout == sharded(2, reduce_gradients="micro_batch")
    results = run_ranks(2, tiny_steps, config, layout, timeout_s=120)[0]
    for result, reference in zip(results, single_process(config.model_dump_json()), strict=True):
        assert (result.loss, result.grad_norm) == pytest.approx(reference, rel=1e-5)


def test_reducing_after_every_micro_batch_is_for_shards() -> None:
    with pytest.raises(ConfigError, match=r"parallel: .*goes with fully_sharded: true"):
        reducing(tiny_config("llama"), "micro_batch", fully_sharded=False)


def reducing(config: RunConfig, when: str, fully_sharded: bool = True) -> RunConfig:
    parallel = {"fully_sharded": fully_sharded, "reduce_gradients": when}
    return validate_config(config.model_dump() | {"parallel": parallel}, "test")


@pytest.mark.multiprocess
def test_evaluation_sees_weights_that_were_changed_after_the_last_one() -> None:
    config = tiny_config("llama", micro_batch_size=1)

    def evaluate(layout: Layout) -> list[list[int]]:
        state = tiny_state(config, layout)
        batch = tiny_batch(0, state.ranks.dp_rank, state.ranks.dp_size, 1)
        found = [evaluate_step(state, batch)[0].tolist()]
        with torch.no_grad():  # as loading a checkpoint does
            for _, parameter in state.wrapped[0].named_parameters():
                parameter.mul_(1.5)
        found.append(evaluate_step(state, batch)[0].tolist())
        step_once(state)
        found.append(evaluate_step(state, batch)[0].tolist())
        if layout.world_size == 1:
            process_groups.shutdown()
        return found

    whole = evaluate(Layout(1))
    assert whole[0] != whole[1] != whole[2]
    for found in run_ranks(2, evaluate, sharded(2), timeout_s=120):
        for mine, theirs in zip(found, whole, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-6)


def save(run_dir: Path, config: RunConfig, layout: Layout, steps: int, at: Path | None = None) -> list[Any]:
    """Train `steps` steps from the checkpoint `at`, or from the start, and save; the curve."""
    state = tiny_state(config, layout)
    first = checkpoint.load(at, state)[0].step if at else 0
    curve = [step_once(state, step) for step in range(first, first + steps)]
    data_state = State.fresh(BATCH, ["code", "prose"]).to_dict(0, 1)
    Checkpoints(run_dir).save(state, data_state, Progress(first + steps, (first + steps) * BATCH * SEQ_LEN))
    if layout.world_size == 1:
        process_groups.shutdown()
    return curve


@pytest.mark.multiprocess
def test_checkpoints_go_from_and_to_every_layout(tmp_path: Path) -> None:
    config = tiny_config("qwen3", micro_batch_size=1, tie_embeddings=True, **UNEVEN)
    way = [Layout(2), sharded(4), sharded(2), sharded(1), Layout(2, pipeline_parallel_size=2)]
    curve, at = [], None
    for number, layout in enumerate(way):
        run_dir = tmp_path / str(number)
        curve += run_ranks(layout.world_size, save, run_dir, config, layout, 1, at, timeout_s=120)[0]
        at = Checkpoints(run_dir).latest()
    for mine, theirs in zip(curve, single_process(config.model_dump_json()), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


@pytest.mark.multiprocess
def test_bf16_weights_go_through_a_run_with_whole_ones_unchanged(tmp_path: Path) -> None:
    config = tiny_config("llama", micro_batch_size=1, precision="bf16")
    straight = run_ranks(2, save, tmp_path / "a", config, sharded(2), 2, timeout_s=120)[0]
    at = Checkpoints(tmp_path / "a").latest()
    save(tmp_path / "b", config, Layout(1), 0, at)
    again = run_ranks(2, save, tmp_path / "c", config, sharded(2), 2, Checkpoints(tmp_path / "b").latest())
    expected = run_ranks(2, save, tmp_path / "d", config, sharded(2), 2, at)
    assert again[0] == expected[0]
    assert straight != again[0]


def test_it_is_not_for_use_with_the_distributed_optimizer() -> None:
    shape = layout_shape(tiny_config("llama"), 128)
    validate(sharded(2), shape)
    with pytest.raises(LayoutError, match="leave distributed_optimizer out"):
        validate(sharded(2, distributed_optimizer=True), shape)
