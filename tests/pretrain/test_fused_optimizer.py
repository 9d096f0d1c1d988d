"""`kernels.adamw` and `kernels.grad_norm` in training: the same run with either form, under every kind of optimizer."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from process_group import run_ranks
from tiny_run import tiny_batch, tiny_config, tiny_state, tiny_steps

from data_scheduler.state import State
from headrace.errors import ConfigError
from parallel import process_groups
from parallel.fused_adamw import fused_adams
from parallel.kernels import extension
from parallel.layout import Layout
from pretrain import checkpoint
from pretrain.config import KernelsConfig, RunConfig
from pretrain.step import StepResult, TrainState, train_step

pytestmark = pytest.mark.skipif(bool(extension.problem()), reason=f"kernels: {extension.problem()}")
Curve = list[tuple[float, float]]
LAYOUTS = {
    "dp2 distributed optimizer": Layout(2, distributed_optimizer=True),
    "dp2 overlap": Layout(2, distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True),
    "tp2+sp": Layout(2, tensor_parallel_size=2, sequence_parallel=True),
    "pp2": Layout(2, pipeline_parallel_size=2),
    "fully sharded": Layout(2, fully_sharded=True),
}


def with_kernels(adamw: str, grad_norm: str, family: str = "llama", **changes: Any) -> RunConfig:
    config = tiny_config(family, **changes)
    return config.model_copy(update={"kernels": KernelsConfig.model_validate({"adamw": adamw, "grad_norm": grad_norm})})


def curve(results: list[StepResult]) -> Curve:
    return [(result.loss, result.grad_norm) for result in results]


def in_rank(config: RunConfig, layout: Layout) -> Curve:
    return curve(tiny_steps(config, layout))


def weights(state: TrainState) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in state.chunks[0].parameters()]


def assert_same(mine: Curve, other: Curve, tolerance: float = 1e-6) -> None:
    for (loss, norm), (other_loss, other_norm) in zip(mine, other, strict=True):
        assert loss == pytest.approx(other_loss, rel=tolerance)
        assert norm == pytest.approx(other_norm, rel=tolerance)


@pytest.mark.parametrize("clip_grad", [1.0, 0.1, 0.0])
def test_one_process_has_one_curve(clip_grad: float) -> None:
    forms = [("torch", "torch"), ("fused", "torch"), ("torch", "fused"), ("fused", "fused")]
    curves = [curve(tiny_steps(with_kernels(*form, clip_grad=clip_grad), Layout(1))) for form in forms]
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert curves[1] == curves[0]  # our update is torch's bit for bit
    for other in curves[1:]:
        assert_same(other, curves[0])
    if clip_grad:
        assert all(norm > clip_grad for _, norm in curves[0]) == (clip_grad < 1.0)


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_has_one_curve(name: str) -> None:
    layout = LAYOUTS[name]
    torchs = functools.partial(in_rank, with_kernels("torch", "torch", clip_grad=0.5, micro_batch_size=1))
    fused = functools.partial(in_rank, with_kernels("fused", "fused", clip_grad=0.5, micro_batch_size=1))
    for other, mine in zip(*(run_ranks(2, run, layout, timeout_s=120) for run in (torchs, fused)), strict=True):
        assert_same(mine, other)


@pytest.mark.multiprocess
@pytest.mark.parametrize("sharded", [False, True])
def test_bf16_weights_are_their_masters_rounded(sharded: bool) -> None:
    """Written by the update itself; the curve is that of torch, whose update and copy give the same bits."""

    def run(form: str) -> tuple[Curve, bool]:
        state = tiny_state(with_kernels(form, "torch", precision="bf16", micro_batch_size=1), layout)
        ranks = state.ranks
        results = [train_step(state, tiny_batch(step, ranks.dp_rank, ranks.dp_size, 1), 1e-3) for step in range(3)]
        part = state.optimizer.chained_optimizers[0]
        if sharded:
            pairs = zip(part.shard_float16_groups, part.shard_fp32_from_float16_groups, strict=True)
        else:
            pairs = zip(part.float16_groups, part.fp32_from_float16_groups, strict=True)
        both = [(a, b) for halves, masters in pairs for a, b in zip(halves, masters, strict=True)]
        assert len(both) > 10
        return curve(results), all(torch.equal(half, master.bfloat16()) for half, master in both)

    layout = Layout(2, distributed_optimizer=True) if sharded else Layout(2)
    torchs, fused = (run_ranks(2, run, form, timeout_s=120) for form in ("torch", "fused"))
    assert [rounded for _, rounded in [*torchs, *fused]] == [True] * 4
    assert_same(fused[0][0], torchs[0][0])


@pytest.mark.parametrize("kind", ["sgd", "muon"])
def test_other_optimizers_have_one_curve(kind: str) -> None:
    adamw = "auto" if kind == "sgd" else "fused"
    fused, torchs = (
        curve(tiny_steps(with_kernels(*forms, kind=kind, clip_grad=0.3), Layout(1)))
        for forms in ((adamw, "fused"), ("torch", "torch"))
    )
    assert_same(fused, torchs)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_skipped(bad: float, precision: str) -> None:
    state = tiny_state(with_kernels("fused", "fused", precision=precision), Layout(1))
    train_step(state, tiny_batch(0), 1e-3)
    before, optimizer = weights(state), state.optimizer
    optimizer.prepare_grads, prepare = (
        functools.partial(_poison, state, bad, optimizer.prepare_grads),
        optimizer.prepare_grads,
    )
    result = train_step(state, tiny_batch(1), 1e-3)
    assert result.skipped
    assert all(torch.equal(a, b) for a, b in zip(weights(state), before, strict=True))
    assert {group["step"] for group in optimizer.param_groups} == {1}
    optimizer.prepare_grads = prepare
    assert not train_step(state, tiny_batch(2), 1e-3).skipped
    process_groups.shutdown()


def _poison(state: TrainState, bad: float, prepare: Any) -> bool:
    next(state.chunks[0].parameters()).main_grad[0] = bad
    done: bool = prepare()
    return done


def test_gradients_stay_as_they_are_in_memory() -> None:
    """Clipping is part of the update, not a pass of its own."""
    state = tiny_state(with_kernels("fused", "fused", clip_grad=0.01), Layout(1))
    result = train_step(state, tiny_batch(0), 1e-3)
    squares = [float(parameter.main_grad.double().square().sum()) for parameter in state.chunks[0].parameters()]
    assert sum(squares) ** 0.5 == pytest.approx(result.grad_norm, rel=1e-6)
    assert result.grad_norm > 0.01
    process_groups.shutdown()


@pytest.mark.multiprocess
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_may_change_the_kernels_when_it_resumes(precision: str, tmp_path: Path) -> None:
    """Checkpoints of both forms hold the same, so a run goes on alike with the other one and under ZeRO-1."""

    def first(form: str) -> Curve:
        state = tiny_state(with_kernels(form, form, precision=precision), Layout(1))
        for step in range(2):
            train_step(state, tiny_batch(step), 1e-3)
        data_state = State.fresh(8, ["code", "prose"]).to_dict(0, 1)
        checkpoint.Checkpoints(tmp_path / form).save(state, data_state, checkpoint.Progress(2, 0))
        return curve([train_step(state, tiny_batch(step), 1e-3) for step in (2, 3)])

    def second(form: str, layout: Layout) -> Curve:
        state = tiny_state(with_kernels(form, form, precision=precision, micro_batch_size=1), layout)
        ranks = state.ranks
        checkpoint.load(checkpoint.Checkpoints(tmp_path / ("fused" if form == "torch" else "torch")).path(2), state)
        return curve([train_step(state, tiny_batch(s, ranks.dp_rank, ranks.dp_size, 1), 1e-3) for s in (2, 3)])

    expected = {form: run_ranks(1, first, form, timeout_s=120)[0] for form in ("torch", "fused")}
    tolerance = 1e-6 if precision == "fp32" else 5e-3
    assert_same(run_ranks(1, second, "torch", Layout(1), timeout_s=120)[0], expected["fused"], tolerance)
    sharded = Layout(2, distributed_optimizer=True)
    assert_same(run_ranks(2, second, "fused", sharded, timeout_s=120)[0], expected["torch"], tolerance)


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ["one process", "dp2 distributed optimizer", "tp2+sp"])
def test_metrics_of_the_update_come_from_the_kernel(name: str) -> None:
    layout = LAYOUTS.get(name, Layout(1))

    def measured(form: str) -> Any:
        state = tiny_state(with_kernels(form, form, clip_grad=0.1, micro_batch_size=1), layout)
        assert (fused_adams(state.optimizer) is not None) == (form == "fused")
        state.measured, found, ranks = True, [], state.ranks
        for step in range(2):
            if step == 1:
                state.stage = state.stage._replace(trainable=("decoder.layers.1.*",))
            found.append(train_step(state, tiny_batch(step, ranks.dp_rank, ranks.dp_size, 1), 1e-3).dynamics)
        return found

    mine, others = (run_ranks(layout.world_size, measured, form, timeout_s=120)[0] for form in ("fused", "torch"))
    for values, expected in zip(mine, others, strict=True):
        assert values.keys() == expected.keys()
        for kind in ("weight_rms", "gradient_rms", "update_rms", "mlp_gradient_rms"):
            assert values[kind] == pytest.approx(expected[kind], rel=2e-6), kind
    assert mine[1]["update_rms"]["0"] == 0.0  # frozen


def test_a_skipped_step_is_measured_as_before() -> None:
    found = []
    for form in ("fused", "torch"):
        state = tiny_state(with_kernels(form, form), Layout(1))
        state.measured = True
        state.optimizer.prepare_grads = functools.partial(_poison, state, float("nan"), state.optimizer.prepare_grads)
        result = train_step(state, tiny_batch(0), 1e-3)
        assert result.skipped
        assert result.dynamics is not None
        found.append({key: str(value) for key, value in result.dynamics.items()})
        process_groups.shutdown()
    assert found[0] == found[1]
    assert found[0]["update_rms"] == "{}"


@pytest.mark.multiprocess
def test_experts_and_the_rest_have_one_norm() -> None:
    config = functools.partial(
        with_kernels, num_experts=4, moe_top_k=2, moe_ffn_hidden_size=48, micro_batch_size=1, clip_grad=0.5
    )
    layout = Layout(2, expert_parallel_size=2)
    fused, torchs = (
        run_ranks(2, in_rank, config(form, form, "qwen3"), layout, timeout_s=120) for form in ("fused", "torch")
    )
    assert fused[0] == fused[1]
    assert_same(fused[0], torchs[0])


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"kernels\.adamw: fused, but optimizer\.kind is sgd; leave the key out"):
        tiny_state(with_kernels("fused", "auto", kind="sgd"), Layout(1))
    process_groups.shutdown()
    monkeypatch.setattr(extension, "problem", lambda: "not built")
    for forms, key in ((("fused", "auto"), "adamw"), (("auto", "fused"), "grad_norm")):
        with pytest.raises(ConfigError, match=rf"kernels\.{key}: fused is not available on cpu: not built"):
            tiny_state(with_kernels(*forms), Layout(1))
        process_groups.shutdown()
    state = tiny_state(with_kernels("auto", "auto"), Layout(1))  # torch, without a word
    assert fused_adams(state.optimizer) is None
    assert not train_step(state, tiny_batch(0), 1e-3).skipped
    process_groups.shutdown()
