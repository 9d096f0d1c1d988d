"""Fused activations and embedding gradient in a model: what is plugged in, and that they give torch's loss curve."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import pytest
from process_group import run_ranks
from tiny_run import VOCAB, tiny_config, tiny_state, tiny_steps, with_kernels

from headrace.errors import ConfigError
from parallel import process_groups
from parallel.activations import BiasGeluLinear, geglu_tanh
from parallel.embedding import SortedEmbedding
from parallel.kernels import extension, geglu
from parallel.layout import Layout
from pretrain.checkpoint import model_identity
from pretrain.config import KernelsConfig, RunConfig
from pretrain.models.gpt import build_model
from pretrain.step import StepResult

built = pytest.mark.skipif(bool(extension.problem()), reason=f"kernels: {extension.problem()}")
TORCH = {"swiglu": "torch", "geglu": "torch", "bias_gelu": "torch", "embedding": "torch"}


def config_of(kernel: str, form: str, family: str, **changes: Any) -> RunConfig:
    """Everything by torch, but `kernel` in this form."""
    # At 1e-3 rounding differences grow to 1.4e-6 of the gradient norm in five steps: Adam's first updates have the size
    # of the learning rate however small a gradient is.
    config = tiny_config(family, **{"lr": 2e-4, **changes})
    return config.model_copy(update={"kernels": KernelsConfig.model_validate({**TORCH, kernel: form})})


def check_one_curve(fused: Sequence[StepResult], torchs: Sequence[StepResult]) -> None:
    for mine, other in zip(fused, torchs, strict=True):
        assert mine.loss == pytest.approx(other.loss, rel=1e-6)
        assert mine.grad_norm == pytest.approx(other.grad_norm, rel=1e-6)


def curve(kernel: str, form: str, family: str, layout: Layout, changes: dict[str, Any]) -> list[StepResult]:
    return tiny_steps(config_of(kernel, form, family, **changes), layout)


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bias_gelu": ("wonton", {}),
    "bias_gelu tanh": ("wonton", {"activation": "gelu_tanh"}),
    "geglu": ("llama", {"activation": "gelu"}),
    "geglu tanh": ("qwen3", {"activation": "gelu_tanh"}),
    "embedding": ("llama", {}),
    "embedding tied": ("llama", {"tie_embeddings": True}),
}


@built
@pytest.mark.parametrize("case", MODELS)
def test_fused_and_torch_have_one_loss_curve(case: str) -> None:
    family, changes = MODELS[case]
    fused, torchs = (curve(case.split()[0], form, family, Layout(1), changes) for form in ("fused", "torch"))
    check_one_curve(fused, torchs)
    sums = [[(step.loss, step.grad_norm) for step in steps] for steps in (fused, torchs)]
    # Activations differ by rounding, so both were used; the embedding's gradient is the very same on one CPU.
    assert (sums[0] == sums[1]) == case.startswith("embedding") or case == "embedding tied"


LAYOUTS = {
    "tp2": Layout(2, tensor_parallel_size=2),
    "tp2 sp": Layout(2, tensor_parallel_size=2, sequence_parallel=True),
    "pp2": Layout(2, pipeline_parallel_size=2),
    "overlap": Layout(2, distributed_optimizer=True, overlap_grad_reduce=True),
    "fully sharded": Layout(2, fully_sharded=True),
}


@functools.cache
def by_torch_on_one_process(tied: bool) -> list[StepResult]:
    return tiny_steps(config_of("embedding", "torch", "wonton", tie_embeddings=tied), Layout(1))


@built
@pytest.mark.multiprocess
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_have_the_curve_of_one_process(layout: str) -> None:
    """Untied and tied embedding; with it, where it is split over ranks, bias and GELU."""
    for tied in (False, True):
        config = config_of("embedding", "fused", "wonton", tie_embeddings=tied)
        config = config.model_copy(update={"kernels": config.kernels.model_copy(update={"bias_gelu": "fused"})})
        torchs = by_torch_on_one_process(tied)
        for curves in run_ranks(2, tiny_steps, config, LAYOUTS[layout], timeout_s=120):
            check_one_curve(curves, torchs)


@built
@pytest.mark.parametrize("case", ["bias_gelu", "geglu", "embedding tied"])
def test_bf16_is_as_far_from_fp32_as_torch_is(case: str) -> None:
    family, changes = MODELS[case]
    kernel = case.split()[0]
    exact = curve(kernel, "torch", family, Layout(1), changes)
    fused, torchs = (
        curve(kernel, form, family, Layout(1), {**changes, "precision": "bf16"}) for form in ("fused", "torch")
    )
    for mine, other, true in zip(fused, torchs, exact, strict=True):
        assert math.isfinite(mine.loss)
        assert mine.loss == pytest.approx(true.loss, rel=max(1e-3, 2 * abs(other.loss / true.loss - 1)))


@built
@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("case", ["bias_gelu", "geglu"])
def test_recomputation_changes_nothing_with_the_fused_form(case: str, recompute: str) -> None:
    family, changes = MODELS[case]
    plain, again = (
        # ours adds and normalises in one pass, but where blocks are recomputed whole
        tiny_steps(
            with_kernels(config_of(case, "fused", family, **changes, recompute=each), residual_norm="torch"),
            Layout(1),
            steps=3,
        )
        for each in ("none", recompute)
    )
    assert [(step.loss, step.grad_norm) for step in plain] == [(step.loss, step.grad_norm) for step in again]


def parts(config: RunConfig) -> tuple[set[object], type]:
    """What the blocks' MLPs compute bias and activation with, and the class of the embedding."""
    chunk = tiny_state(config, Layout(1)).chunks[0]
    process_groups.shutdown()
    mlps = [layer.mlp for layer in chunk.decoder.layers]
    fc1 = {type(mlp.linear_fc1) for mlp in mlps}
    used = fc1 if BiasGeluLinear in fc1 else {mlp.activation_func for mlp in mlps}
    return used, type(chunk.embedding.word_embeddings)


@built
def test_every_part_is_what_the_config_says() -> None:
    assert parts(tiny_config("wonton")) == parts(tiny_config("wonton", activation="gelu_tanh"))
    assert parts(tiny_config("wonton")) == ({BiasGeluLinear}, SortedEmbedding)
    assert parts(tiny_config("llama", activation="gelu"))[0] == {geglu.fused}
    assert parts(tiny_config("llama", activation="gelu_tanh"))[0] == {geglu_tanh}
    by_torch = tiny_config("wonton").model_copy(update={"kernels": KernelsConfig.model_validate(TORCH)})
    used, embedding = parts(by_torch)
    assert BiasGeluLinear not in used
    assert embedding is not SortedEmbedding


@pytest.mark.parametrize(
    ("family", "activation", "kernel", "message"),
    [
        (
            "llama",
            None,
            "bias_gelu",
            "kernels.bias_gelu: fused, but llama has no bias before a GELU; leave the key out",
        ),
        ("llama", None, "geglu", "kernels.geglu: fused, but llama has no GeGLU"),
        ("llama", "gelu", "swiglu", "kernels.swiglu: fused, but llama with activation gelu has no SwiGLU"),
        ("wonton", None, "geglu", "kernels.geglu: fused, but wonton has no GeGLU"),
    ],
)
def test_a_kernel_for_what_the_model_has_not_is_refused(
    family: str, activation: str | None, kernel: str, message: str
) -> None:
    config = tiny_config(family, activation=activation)
    with pytest.raises(ConfigError) as raised:
        build_model(config.model, Layout(1), 8, VOCAB, kernels=KernelsConfig.model_validate({kernel: "fused"}))
    assert message in str(raised.value)


def test_fp16_and_a_missing_library_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_config("wonton").model
    for kernel in ("bias_gelu", "embedding"):
        kernels = KernelsConfig.model_validate({**TORCH, kernel: "fused"})
        with monkeypatch.context() as patch:
            patch.setattr(extension, "problem", lambda: "not built")
            with pytest.raises(ConfigError, match=rf"kernels\.{kernel}: fused is not available on cpu: not built"):
                build_model_alone(model, kernels)
    with pytest.raises(ConfigError, match=r"kernels\.bias_gelu: fused does not take fp16"):
        build_model(model, Layout(1), 8, VOCAB, precision="fp16", kernels=KernelsConfig(bias_gelu="fused"))


def build_model_alone(model: Any, kernels: KernelsConfig) -> None:
    process_groups.initialize(Layout(1), seed=1, timeout_s=60)
    try:
        build_model(model, Layout(1), 8, VOCAB, kernels=kernels)
    finally:
        process_groups.shutdown()


def test_the_activation_is_part_of_what_a_checkpoint_is() -> None:
    """The family's own is not, said or not: older checkpoints say nothing."""
    for family, own, other in (("wonton", "gelu", "gelu_tanh"), ("llama", "silu", "gelu")):
        unsaid, said, changed = (
            model_identity(tiny_config(family, activation=each).model, VOCAB, "fp32") for each in (None, own, other)
        )
        assert "activation" not in unsaid
        assert unsaid == said
        assert changed["activation"] == other


def test_a_gate_that_wonton_has_not_is_refused() -> None:
    with pytest.raises(ConfigError, match="activation silu: the wonton family has no gates; take gelu or gelu_tanh"):
        tiny_config("wonton", activation="silu")
