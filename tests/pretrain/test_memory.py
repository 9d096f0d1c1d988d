"""The memory estimate: weights, gradients and optimizer state to the byte, activations against what autograd keeps."""

from collections import Counter
from typing import Any, ClassVar

import pytest
import torch
from process_group import run_ranks
from tiny_run import BATCH, SEQ_LEN, VOCAB, tiny_batch, tiny_config, tiny_state

from parallel import process_groups
from parallel.kernels import extension
from parallel.layout import Layout
from pretrain.config import KernelsConfig, RunConfig
from pretrain.models.memory import Batch, Kernels, StageMemory, memory_by_stage
from pretrain.models.presets import PRESETS
from pretrain.step import TrainState, train_step

TOLERANCE = 0.1
"""Of activations. What is left out: rsqrt of norms on a CPU, masks of split vocabularies, a dozen numbers a token."""
FIELDS = {"fused_norms": "residual_norm", "fused_qk_norm_rope": "qk_norm_rope", "fused_head": "head"}
"""What the estimate calls kernels of ours; in these tests all are torch's but for those that a test names."""


class Held:
    """A tensor that autograd keeps; the storage counts once, however many views of it are kept."""

    users: ClassVar[Counter[int]] = Counter()
    now = peak = 0
    known: ClassVar[set[int]] = set()

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, storage = tensor, tensor.untyped_storage()
        self.address, self.size = storage.data_ptr(), storage.nbytes()
        Held.users[self.address] += 1
        if Held.users[self.address] == 1 and self.address not in Held.known:
            Held.now += self.size
            Held.peak = max(Held.peak, Held.now)

    def __del__(self) -> None:
        Held.users[self.address] -= 1
        if Held.users[self.address] == 0 and self.address not in Held.known:
            Held.now -= self.size


def storages(tensors: Any) -> dict[int, int]:
    """Address → bytes."""
    found = (tensor.untyped_storage() for tensor in tensors if tensor is not None)
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def measured(config: RunConfig, layout: Layout) -> dict[str, int]:
    """Bytes of this rank's buffers after a step, and the most that autograd kept during the next one."""
    state: TrainState = tiny_state(config, layout)
    size = config.train.micro_batch_size
    ranks = state.ranks
    batches = [tiny_batch(step, ranks.dp_rank, ranks.dp_size, size) for step in range(2)]
    train_step(state, batches[0], 1e-3)
    weights = storages(parameter for chunk in state.chunks for parameter in chunk.parameters())
    gradients = storages(buffer.grad_data for chunk in state.wrapped for buffer in chunk.buffers)
    optimizer = {}
    for part in state.optimizer.chained_optimizers:
        groups = [group["params"] for group in part.optimizer.param_groups]
        optimizer |= storages(parameter for group in groups for parameter in group)
        optimizer |= storages(
            value for kept in part.optimizer.state.values() for value in kept.values() if torch.is_tensor(value)
        )
    optimizer = {address: size for address, size in optimizer.items() if address not in weights}
    # The cosines of all micro-batches are inputs; buffers and weights stand for themselves.
    Held.users, Held.now, Held.peak, Held.known = Counter(), 0, 0, set(weights) | set(gradients)
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        train_step(state, batches[1], 1e-3)
    kept = Held.peak
    if layout.world_size == 1:
        process_groups.shutdown()
    return {
        "weights": sum(weights.values()),
        "gradients": sum(gradients.values()),
        "optimizer": sum(optimizer.values()),
        "activations": kept,
    }


def estimated(config: RunConfig, layout: Layout) -> list[StageMemory]:
    train = config.train
    micro_batches = BATCH // layout.data_parallel_size // train.micro_batch_size
    batch = Batch(SEQ_LEN, train.micro_batch_size, micro_batches)
    here = Kernels(gpu=False, **{field: getattr(config.kernels, key) == "fused" for field, key in FIELDS.items()})
    optimizer = config.optimizer
    return memory_by_stage(config.model, VOCAB, layout, batch, train.precision, train.recompute, here, optimizer)


def config_of(family: str, fused: str = "", **changes: Any) -> RunConfig:
    config = tiny_config(family, **changes)
    kernels = {key: "fused" if key == fused else "torch" for key in KernelsConfig.model_fields}
    return config.model_copy(update={"kernels": KernelsConfig.model_validate(kernels)})


def assert_activations_are_near(kept: int, stage: StageMemory, config: RunConfig) -> None:
    copy = 2 * VOCAB * SEQ_LEN * config.train.micro_batch_size if config.train.precision == "bf16" else 0
    logits = max(0, stage.logits - copy)  # which autograd never keeps
    expected = stage.activations + max(logits, stage.recomputed)
    assert kept == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(
    ("family", "precision"), [("llama", "fp32"), ("llama", "bf16"), ("qwen3", "bf16"), ("wonton", "fp32")]
)
def test_one_process(family: str, precision: str, recompute: str) -> None:
    config = config_of(family, precision=precision, recompute=recompute, tie_embeddings=family == "qwen3")
    found = measured(config, Layout(1))
    [stage] = estimated(config, Layout(1))
    expected = standing(stage)
    assert {key: found[key] for key in expected} == expected
    assert_activations_are_near(found["activations"], stage, config)


@pytest.mark.skipif(bool(extension.problem_on("qk_norm_rope_forward", "cpu")), reason=f"kernels: {extension.problem()}")
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(("family", "precision"), [("llama", "fp32"), ("qwen3", "bf16"), ("wonton", "fp32")])
def test_fused_queries_and_keys(family: str, precision: str, recompute: str) -> None:
    config = config_of(family, "qk_norm_rope", precision=precision, recompute=recompute)
    torchs = config_of(family, precision=precision, recompute=recompute)
    [stage], [unfused] = (estimated(each, Layout(1)) for each in (config, torchs))
    assert recompute != "none" or stage.activations <= unfused.activations
    assert_activations_are_near(measured(config, Layout(1))["activations"], stage, config)


@pytest.mark.skipif(bool(extension.problem()), reason=f"kernels: {extension.problem()}")
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(("family", "precision"), [("llama", "bf16"), ("wonton", "fp32")])
def test_fused_norms_keep_a_number_or_two_for_each_token(family: str, precision: str, recompute: str) -> None:
    config = config_of(family, "residual_norm", precision=precision, recompute=recompute)
    [stage], [torchs] = estimated(config, Layout(1)), estimated(config_of(family, precision=precision), Layout(1))
    assert_activations_are_near(measured(config, Layout(1))["activations"], stage, config)
    assert family == "wonton" or stage.activations < 0.8 * torchs.activations


def standing(stage: StageMemory) -> dict[str, int]:
    return {"weights": stage.weights, "gradients": stage.gradients, "optimizer": stage.optimizer}


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("llama", Layout(2, tensor_parallel_size=2)),
        ("wonton", Layout(2, tensor_parallel_size=2, sequence_parallel=True)),
        ("llama", Layout(2, pipeline_parallel_size=2)),
        ("wonton", Layout(2, pipeline_parallel_size=2, virtual_pipeline_parallel_size=2)),
        ("qwen3", Layout(2, pipeline_parallel_size=2, distributed_optimizer=True)),
        ("qwen3", Layout(2, distributed_optimizer=True)),
    ],
    ids=lambda value: str(value),
)
def test_two_processes(family: str, layout: Layout) -> None:
    precision = "bf16" if layout.distributed_optimizer else "fp32"
    config = config_of(family, precision=precision, tie_embeddings=family != "wonton")
    found = run_ranks(2, measured, config, layout, timeout_s=120)
    stages = estimated(config, layout)
    for rank, of_rank in enumerate(found):
        stage = stages[layout.coordinates(rank)[0]]
        assert (of_rank["weights"], of_rank["gradients"]) == (stage.weights, stage.gradients)
        # A rank whose shard holds padding has that much less.
        assert of_rank["optimizer"] <= stage.optimizer
        group = [found[r]["optimizer"] for r in range(2) if layout.coordinates(r)[0] == stage.stage]
        whole = stage.parameters * (12 if precision == "bf16" else 8)
        assert sum(group) == whole * (1 if layout.distributed_optimizer else len(group))
        assert_activations_are_near(of_rank["activations"], stage, config)


def test_the_worked_example() -> None:
    layout, batch = Layout(1), Batch(4096, 1, 8)
    [stage] = memory_by_stage(PRESETS["llama-1b"], 128_256, layout, batch)
    assert stage.activations / 1e9 == pytest.approx(7.5, abs=0.05)
    assert (stage.weights, stage.gradients, stage.optimizer) == tuple(stage.parameters * size for size in (2, 4, 12))
    assert stage.logits == 4096 * (128_256 * 6 + 2048 * 4 + 4)
    assert stage.total == sum(standing(stage).values()) + stage.inputs + stage.activations + stage.logits
    [fused] = memory_by_stage(PRESETS["llama-1b"], 128_256, layout, batch, kernels=Kernels(fused_head=True))
    assert fused.logits == 4096 * (128_256 * 2 + 2048 * 6 + 4)  # 4,096 tokens are one chunk
    twice = Batch(8192, 1, 8)
    [longer] = memory_by_stage(PRESETS["llama-1b"], 128_256, layout, twice, kernels=Kernels(fused_head=True))
    assert longer.logits - fused.logits == 4096 * (2048 * 6 + 4)  # and 8,192 are two


def test_a_block_keeps_what_the_paper_says() -> None:
    """Korthikanti et al., equation 1: s·b·h·(34 + 5·a·s/h) bytes for GPT in 16 bit; ours has no dropout masks (2 bytes)
    and no scores, and keeps the rotated queries and keys (4) besides those in the fused output."""
    model = PRESETS["wonton-6.7b"].model_copy(update={"qk_norm": False})
    [stage] = memory_by_stage(model, 139_776, Layout(1), Batch(2048, 1, 1))
    per_block = stage.activations / 2048 / model.num_layers
    assert per_block == pytest.approx(model.hidden_size * (34 - 2 + 4), rel=0.005)


def test_what_splits_what() -> None:
    model, batch = PRESETS["llama-8b"], Batch(4096, 1, 8)

    def whole(layout: Layout, **more: Any) -> list[StageMemory]:
        return memory_by_stage(model, 128_256, layout, batch, **more)

    [one] = whole(Layout(1))
    [zero] = whole(Layout(64, distributed_optimizer=True))
    assert zero.optimizer == pytest.approx(one.optimizer / 64, rel=1e-5)
    assert zero.activations == one.activations
    [tensor] = whole(Layout(4, tensor_parallel_size=4))
    [sequence] = whole(Layout(4, tensor_parallel_size=4, sequence_parallel=True))
    assert tensor.activations > sequence.activations
    assert sequence.activations == pytest.approx(one.activations / 4, rel=1e-3)
    [context] = whole(Layout(2, context_parallel_size=2))
    assert context.activations < 0.6 * one.activations
    stages = whole(Layout(4, pipeline_parallel_size=4))
    kept = [stage.activations for stage in stages]
    assert kept[0] == pytest.approx(one.activations, rel=0.01)  # a quarter of the layers, four micro-batches in flight
    assert kept == sorted(kept, reverse=True)
    interleaved = whole(Layout(4, pipeline_parallel_size=4, virtual_pipeline_parallel_size=2))
    assert interleaved[0].activations / kept[0] == pytest.approx(1 + 3 / 8)  # 1 + (p - 1) / (p·v), arXiv 2104.04473
    assert [one.activations > whole(Layout(1), recompute=kind)[0].activations for kind in ("selective", "full")]


def test_breadth_first_holds_every_micro_batch_of_all_chunks_but_the_last() -> None:
    layout = Layout(4, pipeline_parallel_size=4, virtual_pipeline_parallel_size=2, pipeline_schedule="breadth_first")
    model, batch = PRESETS["llama-8b"], Batch(4096, 1, 8)
    [one, *_] = memory_by_stage(model, 128_256, Layout(1), batch)
    [first, *_, last] = memory_by_stage(model, 128_256, layout, batch)
    # Each chunk has an eighth of the layers; 2 · (4 − 1) + 8 + 1 and 8 + 1 forward passes wait.
    assert first.activations / one.activations == pytest.approx(15 / 8, rel=0.01)
    assert last.activations / one.activations == pytest.approx(9 / 8, rel=0.01)


@pytest.mark.parametrize("method", ["all_gather", "all_to_all"])
def test_context_parallel_inputs_grow_with_the_tokens_only(method: Any) -> None:
    layout = Layout(2, context_parallel_size=2, context_parallel_method=method)
    short, long = (memory_by_stage(PRESETS["llama-8b"], 128, layout, Batch(n, 1, 1))[0] for n in (4096, 8192))
    assert long.inputs == 2 * short.inputs


def test_fp16_needs_what_bf16_does() -> None:
    model, batch = PRESETS["llama-8b"], Batch(4096, 1, 8)
    found = [memory_by_stage(model, 128_256, Layout(1), batch, precision) for precision in ("fp16", "bf16")]
    assert found[0] == found[1]
