"""`kernels.qk_norm_rope` in a model: one loss curve with torch's form in every layout, and the same checkpoints."""

import math

import pytest
import torch
from process_group import run_ranks
from tiny_run import VOCAB, tiny_batch, tiny_config, tiny_state, tiny_steps, with_kernels

from headrace.errors import ConfigError
from parallel import process_groups
from parallel.kernels import extension
from parallel.layout import Layout
from parallel.self_attention import FusedSelfAttention
from pretrain.config import KernelsConfig, RunConfig
from pretrain.models.gpt import build_model
from pretrain.step import StepResult, train_step

built = pytest.mark.skipif(
    bool(extension.problem_on("qk_norm_rope_forward", "cpu")), reason=f"kernels: {extension.problem()}"
)


def with_form(form: str, family: str = "qwen3", **changes: object) -> RunConfig:
    config = tiny_config(family, **changes)
    kernels = KernelsConfig.model_validate({"swiglu": "torch", "qk_norm_rope": form})
    return config.model_copy(update={"kernels": kernels})


def assert_close(mine: list[StepResult], other: list[StepResult], rel: float = 1e-6) -> None:
    for step, expected in zip(mine, other, strict=True):
        assert step.loss == pytest.approx(expected.loss, rel=rel)
        assert step.grad_norm == pytest.approx(expected.grad_norm, rel=rel)


@built
@pytest.mark.parametrize("family", ["wonton", "qwen3", "llama"])
def test_fused_and_torch_have_one_loss_curve(family: str) -> None:
    fused, torchs = (tiny_steps(with_form(form, family), Layout(1)) for form in ("fused", "torch"))
    assert_close(fused, torchs)
    # they differ by rounding, so both were used
    assert [step.source_loss_sums.tolist() for step in fused] != [step.source_loss_sums.tolist() for step in torchs]


@built
@pytest.mark.parametrize("family", ["wonton", "qwen3"])
def test_bf16_stays_near_torch(family: str) -> None:
    fused, torchs = (tiny_steps(with_form(form, family, precision="bf16"), Layout(1)) for form in ("fused", "torch"))
    for mine, other in zip(fused, torchs, strict=True):
        assert math.isfinite(mine.loss)
        assert mine.loss == pytest.approx(other.loss, rel=1e-3)


LAYOUTS = {
    "tensor and sequence": Layout(2, tensor_parallel_size=2, sequence_parallel=True),
    "context, all_gather": Layout(2, context_parallel_size=2),
    "context, all_to_all": Layout(2, context_parallel_size=2, context_parallel_method="all_to_all"),
    "pipeline": Layout(2, pipeline_parallel_size=2),
    "fully sharded": Layout(2, fully_sharded=True),
}


@built
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_as_one_process_does(name: str) -> None:
    layout = LAYOUTS[name]
    family = "wonton" if name.startswith(("tensor", "pipeline")) else "qwen3"
    alone = tiny_steps(with_form("torch", family), Layout(1), steps=3)
    ranks = run_ranks(2, lambda: tiny_steps(with_form("fused", family), layout, steps=3), timeout_s=120)
    for each in ranks:
        assert_close(each, alone, rel=1e-5)


@built
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_nothing(recompute: str) -> None:
    # Recomputed whole, a block's norms are not joined to the additions before them.
    plain, again = (
        tiny_steps(with_kernels(with_form("fused", recompute=how), residual_norm="torch"), Layout(1), steps=2)
        for how in ("none", recompute)
    )
    assert [(step.loss, step.grad_norm) for step in plain] == [(step.loss, step.grad_norm) for step in again]


@built
def test_head_size_scaling_and_multi_token_heads() -> None:
    changes = {
        "head_size": 22,
        "rope_scaling": {"kind": "yarn", "factor": 4.0, "original_seq_len": 16},
        "mtp": {"depth": 1},
    }
    fused, torchs = (tiny_steps(with_form(form, "llama", **changes), Layout(1), steps=2) for form in ("fused", "torch"))
    assert_close(fused, torchs)


@built
def test_parameters_have_the_same_names_and_start() -> None:
    states = []
    for form in ("fused", "torch"):
        state = tiny_state(with_form(form, "wonton"), Layout(1))
        layers = state.chunks[0].decoder.layers
        assert all(isinstance(layer.self_attention, FusedSelfAttention) == (form == "fused") for layer in layers)
        states.append({name: x.detach().clone() for name, x in state.chunks[0].named_parameters()})
        process_groups.shutdown()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@built
def test_measured_steps_show_the_same_queries_and_keys() -> None:
    measured = []
    for form in ("fused", "torch"):
        state = tiny_state(with_form(form), Layout(1))
        state.measured = True
        measured.append(train_step(state, tiny_batch(0), 1e-3).dynamics)
        process_groups.shutdown()
    fused, torchs = measured
    assert fused is not None
    assert torchs is not None
    for kind in ("query_norm", "key_norm", "max_attention_logit"):
        assert fused[kind] == pytest.approx(torchs[kind], rel=1e-6), kind


@built
def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = KernelsConfig(qk_norm_rope="fused")
    with pytest.raises(ConfigError, match=r"kernels\.qk_norm_rope: fused does not take fp16; leave the key out"):
        build_model(tiny_config("qwen3").model, Layout(1), 8, VOCAB, precision="fp16", kernels=fused)
    monkeypatch.setattr(extension, "problem", lambda: "not built")
    with pytest.raises(ConfigError, match=r"kernels\.qk_norm_rope: fused is not available on cpu: not built"):
        build_model(tiny_config("qwen3").model, Layout(1), 8, VOCAB, kernels=fused)
