"""`kernels.residual_norm`: blocks that add and normalise in one pass train as those of torch's operators do."""

from typing import Any

import pytest
import torch
from process_group import run_ranks
from tiny_run import VOCAB, tiny_batch, tiny_config, tiny_state, tiny_steps

from headrace.errors import ConfigError
from parallel import process_groups
from parallel.kernels import extension
from parallel.layout import Layout
from parallel.norms import FusedLayerNorm, FusedRMSNorm
from parallel.residual_layer import ResidualNormLayer
from pretrain.config import KernelsConfig, RunConfig
from pretrain.models.gpt import build_model
from pretrain.step import train_step

built = pytest.mark.skipif(bool(extension.problem()), reason=f"kernels: {extension.problem()}")
FORMS = ("fused", "torch")


def with_norms(form: str, family: str = "llama", **changes: Any) -> RunConfig:
    config = tiny_config(family, **changes)
    return config.model_copy(update={"kernels": config.kernels.model_copy(update={"residual_norm": form})})


def curve(form: str, family: str, layout: Layout, changes: dict[str, Any]) -> list[tuple[float, float]]:
    """(loss, gradient norm) of five steps."""
    return [(step.loss, step.grad_norm) for step in tiny_steps(with_norms(form, family, **changes), layout)]


def check_curves(fused: list[tuple[float, float]], torchs: list[tuple[float, float]]) -> None:
    for (loss, grad_norm), (expected_loss, expected_norm) in zip(fused, torchs, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert grad_norm == pytest.approx(expected_norm, rel=5e-6)


@built
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("family", ["llama", "wonton", "qwen3"])
def test_fused_and_torch_have_one_loss_curve(family: str, recompute: str) -> None:
    """RMSNorm and LayerNorm, without biases and with them; recomputed layers are not linked."""
    check_curves(*(curve(form, family, Layout(1), {"recompute": recompute}) for form in FORMS))


@built
@pytest.mark.parametrize("changes", [{"num_experts": 4, "moe_top_k": 2}, {"mtp": {"depth": 2}}], ids=str)
def test_experts_and_heads_have_one_loss_curve(changes: dict[str, Any]) -> None:
    check_curves(*(curve(form, "llama", Layout(1), changes) for form in FORMS))


@built
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("wonton", Layout(2, tensor_parallel_size=2, sequence_parallel=True)),
        ("llama", Layout(2, tensor_parallel_size=2)),
        ("llama", Layout(2, context_parallel_size=2)),
        ("wonton", Layout(2, pipeline_parallel_size=2, virtual_pipeline_parallel_size=2)),
        ("llama", Layout(2, distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)),
        ("llama", Layout(2, fully_sharded=True)),
    ],
    ids=lambda value: str(value),
)
def test_every_layout_has_one_loss_curve(family: str, layout: Layout) -> None:
    expected = curve("torch", family, Layout(1), {})
    for found in run_ranks(2, curve, "fused", family, layout, {}, timeout_s=120):
        for (loss, grad_norm), (expected_loss, expected_norm) in zip(found, expected, strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-6)
            assert grad_norm == pytest.approx(expected_norm, rel=2e-5)


@built
@pytest.mark.parametrize("family", ["llama", "wonton"])
def test_bf16_is_as_near_to_torch_as_torch_to_itself(family: str) -> None:
    """Its losses are no further from fp32's than those of torch's operators, in two orders of summation."""
    exact = curve("torch", family, Layout(1), {})

    def off(form: str, micro_batch_size: int) -> float:
        changes = {"precision": "bf16", "micro_batch_size": micro_batch_size}
        found = curve(form, family, Layout(1), changes)
        return max(abs(loss - expected) for (loss, _), (expected, _) in zip(found, exact, strict=True))

    references = [off("torch", micro_batch_size) for micro_batch_size in (1, 4)]
    assert off("fused", 2) <= 1.5 * max(references)


def built_as(config: RunConfig) -> tuple[Any, list[str]]:
    """(the model, keys of its checkpoint)"""
    chunk = tiny_state(config, Layout(1)).chunks[0]
    keys = list(chunk.sharded_state_dict())
    process_groups.shutdown()
    return chunk, keys


@built
@pytest.mark.parametrize(("family", "kind"), [("llama", FusedRMSNorm), ("wonton", FusedLayerNorm)])
def test_every_norm_of_a_block_is_what_the_config_says(family: str, kind: type[torch.nn.Module]) -> None:
    chunk, keys = built_as(with_norms("auto", family))
    layers = chunk.decoder.layers
    assert all(isinstance(layer, ResidualNormLayer) for layer in layers)
    norms = [norm for layer in layers for norm in (layer.input_layernorm, layer.pre_mlp_layernorm)]
    assert {type(norm) for norm in (*norms, chunk.decoder.final_layernorm)} == {kind}
    assert [len(layer._next_norm) for layer in layers] == [1, 1, 1, 0]
    plain, plain_keys = built_as(with_norms("torch", family))
    assert not [module for module in plain.modules() if isinstance(module, ResidualNormLayer | kind)]
    # A checkpoint of one form is one of the other.
    assert [name for name, _ in chunk.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert keys == plain_keys


@built
def test_layers_that_are_recomputed_are_not_linked() -> None:
    chunk, _ = built_as(with_norms("fused", recompute="full"))
    assert not any(layer._next_norm for layer in chunk.decoder.layers)


def measured(form: str, family: str) -> dict[str, float]:
    """RMS of every block's output in one training step."""
    state = tiny_state(with_norms(form, family), Layout(1))
    state.measured = True
    dynamics = train_step(state, tiny_batch(0), 1e-3).dynamics
    assert dynamics is not None
    by_product = (
        [layer.output_square_sum is not None for layer in state.chunks[0].decoder.layers] if form == "fused" else []
    )
    assert by_product in ([], [True, True, True, False])
    process_groups.shutdown()
    found = dynamics["block_output_rms"]
    assert isinstance(found, dict)
    return found


@built
@pytest.mark.parametrize("family", ["llama", "wonton"])
def test_the_norms_by_product_is_the_rms_that_dynamics_measure(family: str) -> None:
    fused, torchs = (measured(form, family) for form in FORMS)
    assert fused == pytest.approx(torchs, rel=1e-6)


def test_a_kernel_that_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = KernelsConfig(residual_norm="fused")
    with pytest.raises(ConfigError, match=r"kernels\.residual_norm: fused does not take fp16; leave the key out"):
        build_model(tiny_config().model, Layout(1), 8, VOCAB, "fp16", kernels=kernels)
    monkeypatch.setattr(extension, "problem", lambda: "not built")
    with pytest.raises(ConfigError, match=r"kernels\.residual_norm: fused is not available on cpu: not built"):
        build_model(tiny_config().model, Layout(1), 8, VOCAB, kernels=kernels)
    chunk, _ = built_as(tiny_config())  # auto: torch, without a word
    assert not any(isinstance(layer, ResidualNormLayer) for layer in chunk.decoder.layers)
