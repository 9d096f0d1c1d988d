"""`kernels:` in a run's config: which form a model computes with, and that both give one loss curve."""

import math

import pytest
from tiny_run import VOCAB, tiny_config, tiny_state, tiny_steps

from headrace.errors import ConfigError
from parallel import process_groups
from parallel.kernels import extension, swiglu
from parallel.layout import Layout
from pretrain.config import KernelsConfig, RunConfig
from pretrain.models.gpt import build_model

built = pytest.mark.skipif(bool(extension.problem()), reason=f"kernels: {extension.problem()}")


def with_swiglu(form: str, family: str = "llama", **changes: object) -> RunConfig:
    config = tiny_config(family, **changes)
    return config.model_copy(update={"kernels": KernelsConfig.model_validate({"swiglu": form})})


def activations(config: RunConfig) -> list[object]:
    """What each block's MLP computes its activation with."""
    state = tiny_state(config, Layout(1))
    found = [layer.mlp.activation_func for layer in state.chunks[0].decoder.layers]
    process_groups.shutdown()
    return found


@built
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_fused_and_torch_have_one_loss_curve(family: str) -> None:
    curves = [tiny_steps(with_swiglu(form, family), Layout(1), steps=10) for form in ("fused", "torch")]
    for fused, torchs in zip(*curves, strict=True):
        assert fused.loss == pytest.approx(torchs.loss, rel=1e-6)
        assert fused.grad_norm == pytest.approx(torchs.grad_norm, rel=1e-5)
    sums = [[step.source_loss_sums.tolist() for step in curve] for curve in curves]
    assert sums[0] != sums[1]  # they differ by rounding, so both were used


@built
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_nothing_with_the_fused_form(recompute: str) -> None:
    # Norms as torch computes them: ours is one pass with the addition before it, but where blocks are recomputed whole.
    configs = [with_swiglu("fused", recompute=r) for r in ("none", recompute)]
    kernels = configs[0].kernels.model_copy(update={"residual_norm": "torch"})
    plain, again = (tiny_steps(c.model_copy(update={"kernels": kernels}), Layout(1), steps=3) for c in configs)
    assert [(step.loss, step.grad_norm) for step in plain] == [(step.loss, step.grad_norm) for step in again]


@built
def test_bf16_stays_near_torch() -> None:
    fused, torchs = (tiny_steps(with_swiglu(f, precision="bf16"), Layout(1)) for f in ("fused", "torch"))
    for mine, other in zip(fused, torchs, strict=True):
        assert math.isfinite(mine.loss)
        assert mine.loss == pytest.approx(other.loss, rel=1e-3)


@built
def test_every_mlp_gets_what_the_config_says() -> None:
    assert activations(with_swiglu("auto")) == activations(with_swiglu("fused")) == [swiglu.fused] * 4
    assert swiglu.fused not in activations(with_swiglu("torch"))
    assert swiglu.fused not in activations(tiny_config("wonton"))


def test_a_kernel_that_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"kernels\.swiglu: fused, but wonton has no SwiGLU"):
        build_model(tiny_config("wonton").model, Layout(1), 8, VOCAB, kernels=KernelsConfig(swiglu="fused"))
    monkeypatch.setattr(extension, "problem", lambda: "not built")
    with pytest.raises(ConfigError, match=r"kernels\.swiglu: fused is not available on cpu: not built"):
        build_model(tiny_config().model, Layout(1), 8, VOCAB, kernels=KernelsConfig(swiglu="fused"))
    assert swiglu.fused not in activations(tiny_config())  # auto: torch, without a word
