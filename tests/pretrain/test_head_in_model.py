"""`kernels: {head: fused}` in a run: one loss curve with torch in every layout, and what else hangs on the head."""

import math
from typing import Any

import pytest
import torch
from process_group import run_ranks
from tiny_run import VOCAB, tiny_batch, tiny_config, tiny_state, tiny_steps

from headrace.errors import ConfigError
from parallel import process_groups
from parallel.kernels import extension, linear_cross_entropy
from parallel.layout import Layout
from parallel.output_layer import OutputLayer
from pretrain.config import KernelsConfig, RunConfig
from pretrain.loss import FIXED_POINT
from pretrain.models.gpt import build_model
from pretrain.selection.score import token_losses
from pretrain.step import StepResult, evaluate_step, place, train_step

built = pytest.mark.skipif(bool(extension.problem()), reason=f"kernels: {extension.problem()}")


def with_head(form: str, family: str = "llama", **changes: Any) -> RunConfig:
    config = tiny_config(family, **changes)
    return config.model_copy(update={"kernels": KernelsConfig.model_validate({"head": form, "swiglu": "torch"})})


def check_same_curve(fused: list[StepResult], torchs: list[StepResult]) -> None:
    assert len(fused) == len(torchs) > 0
    for mine, other in zip(fused, torchs, strict=True):
        assert mine.loss == pytest.approx(other.loss, rel=1e-6)
        assert mine.grad_norm == pytest.approx(other.grad_norm, rel=1e-6)
        assert mine.source_tokens.tolist() == other.source_tokens.tolist()
        assert abs(mine.source_loss_sums - other.source_loss_sums).max() < 1e-6 * other.source_loss_sums.max()
        assert (mine.mtp_loss or 0.0) == pytest.approx(other.mtp_loss or 0.0, rel=1e-6)
    sums = [[step.source_loss_sums.tolist() for step in curve] for curve in (fused, torchs)]
    assert sums[0] != sums[1]  # they differ by rounding, so both were used


@built
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"z_loss": 1e-2, "max_z_loss": 1e-2},
        {"mtp": {"depth": 2, "loss_weight": 0.3}, "tie_embeddings": True},
        {"mup": True, "mup_base_hidden_size": 32, "mup_base_head_size": 16},
    ],
    ids=["plain", "tied", "z-losses", "multi-token heads", "muP"],
)
def test_fused_and_torch_have_one_loss_curve(changes: dict[str, Any]) -> None:
    fused, torchs = (tiny_steps(with_head(form, **changes), Layout(1), weighted=True) for form in ("fused", "torch"))
    check_same_curve(fused, torchs)


LAYOUTS = {
    "tp": {"tensor_parallel_size": 2},
    "tp+sp": {"tensor_parallel_size": 2, "sequence_parallel": True},
    "pp": {"pipeline_parallel_size": 2},
    "dp overlapped": {"overlap_grad_reduce": True, "distributed_optimizer": True},
    "fully sharded": {"fully_sharded": True},
}


@built
@pytest.mark.multiprocess
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("tied", [False, True])
def test_every_layout_has_the_curve_of_one_process(name: str, tied: bool) -> None:
    def work(form: str) -> list[StepResult]:
        return tiny_steps(
            with_head(form, tie_embeddings=tied, z_loss=1e-2, max_z_loss=1e-2), Layout(2, **LAYOUTS[name])
        )

    found = run_ranks(2, work, "fused", timeout_s=120)
    assert [step.loss for step in found[0]] == [step.loss for step in found[1]]
    alone = tiny_steps(with_head("torch", tie_embeddings=tied, z_loss=1e-2, max_z_loss=1e-2), Layout(1))
    check_same_curve(found[0], alone)


@built
def test_chunks_of_few_tokens_have_the_same_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny_steps(with_head("fused"), Layout(1), steps=3)
    monkeypatch.setattr(linear_cross_entropy, "WORKSPACE_BYTES_CPU", 20 * VOCAB * 4)  # 64 tokens in four chunks
    for mine, other in zip(tiny_steps(with_head("fused"), Layout(1), steps=3), whole, strict=True):
        assert mine.loss == pytest.approx(other.loss, rel=1e-6)
        assert mine.grad_norm == pytest.approx(other.grad_norm, rel=1e-6)


@built
def test_bf16_stays_near_torch() -> None:
    fused, torchs = (tiny_steps(with_head(form, precision="bf16"), Layout(1)) for form in ("fused", "torch"))
    for mine, other in zip(fused, torchs, strict=True):
        assert math.isfinite(mine.loss)
        assert mine.loss == pytest.approx(other.loss, rel=1e-4)
        assert mine.grad_norm == pytest.approx(other.grad_norm, rel=1e-3)


@built
@pytest.mark.parametrize("form", ["fused", "torch"])
def test_what_else_reads_losses_gets_them(form: str) -> None:
    """Evaluation, scores of tokens and measured output logits."""
    state = tiny_state(with_head(form), Layout(1))
    assert isinstance(state.chunks[0].output_layer, OutputLayer) == (form == "fused")
    batch = tiny_batch(0)
    sums, tokens = evaluate_step(state, batch)
    scores = token_losses(state, batch)
    mask = torch.cat([each.loss_mask for each in batch]).numpy()
    assert int(sums.sum()) == pytest.approx(scores[mask].sum() * FIXED_POINT, abs=1)
    assert int(tokens.sum()) == mask.sum()
    assert (scores > 0).all()  # of tokens that carry no loss too
    logits = [
        state.chunks[0](each.input_ids, each.position_ids, None, packed_seq_params=place(each, state).documents).mean()
        for each in batch
    ]
    state.measured = True
    dynamics = train_step(state, batch, 1e-3).dynamics
    process_groups.shutdown()
    assert dynamics is not None
    assert dynamics["output_logit_mean"] == pytest.approx(float(torch.stack(logits).mean()), rel=1e-3, abs=1e-6)


def test_where_it_cannot_be_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_config().model
    with pytest.raises(ConfigError, match=r"kernels\.head: fused does not take fp16; leave the key out"):
        build_model(model, Layout(1), 8, VOCAB, "fp16", kernels=KernelsConfig(head="fused"))
    monkeypatch.setattr(extension, "problem", lambda: "not built")
    with pytest.raises(ConfigError, match=r"kernels\.head: fused is not available on cpu: not built"):
        build_model(model, Layout(1), 8, VOCAB, kernels=KernelsConfig(head="fused"))
    state = tiny_state(tiny_config(), Layout(1))  # auto: torch, without a word
    assert not state.chunks[0].fused_head
    process_groups.shutdown()
