"""Multi-token prediction: labels never cross documents, every layout computes the same, the main loss stays its own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from process_group import run_ranks
from tiny_run import (
    PAIRS,
    VOCAB,
    assert_same_curve,
    single_process,
    tiny_batch,
    tiny_config,
    tiny_state,
    tiny_steps,
    with_kernels,
)

from data_scheduler.state import State
from headrace.errors import ConfigError
from parallel import process_groups
from parallel.layout import Layout
from pretrain.checkpoint import Checkpoints, Progress, load, model_identity
from pretrain.config import RunConfig
from pretrain.convert.native import NativeReader
from pretrain.convert.tensors import native_tensors
from pretrain.convert.to_hf import to_hf
from pretrain.microbatch import split_batch
from pretrain.models.multi_token import labels_ahead
from pretrain.models.sizes import count_parameters, flops_per_token
from pretrain.step import evaluate_step, place, train_step

NAMES = ("dp2 distributed optimizer", "tp2", "tp2+sp", "pp2", "pp2 interleaved", "cp2")
MTP = {"depth": 2, "loss_weight": 0.5}


def config(**changes: Any) -> RunConfig:
    return tiny_config("llama", micro_batch_size=1, mtp=MTP, num_layers=2, **changes)


def test_labels_ahead_never_cross_documents() -> None:
    tokens = np.array([list(range(1, 9)), list(range(11, 19))])
    weights = np.ones(8, np.float32)
    weights[6] = 0.0  # token 17 carries no loss
    (made,) = split_batch(
        tokens, [np.array([0, 3], np.int32), np.array([0], np.int32)], np.array([0, 0]), 2, [None, weights]
    )
    # inputs   1 2 3 | 4 5 6 7 || 11 12 13 14 15 16 17     labels   2 3 . | 5 6 7 8 || 12 13 14 15 16 17 18
    ahead = labels_ahead(made, 2)
    assert torch.where(ahead.loss_mask, ahead.labels, 0).tolist() == [
        [3, 0, 0, 6, 7, 8, 0, 13, 14, 15, 16, 0, 18, 0],
        [0, 0, 0, 7, 8, 0, 0, 14, 15, 16, 0, 18, 0, 0],
    ]
    assert ahead.loss_weights is not None
    assert ahead.loss_weights[0].tolist() == [1.0] * 11 + [0.0] + [1.0] * 2


def test_what_is_minimised_is_the_main_loss_and_the_heads_mean() -> None:
    # Fused, these two add to the gradient's buffer themselves.
    state = tiny_state(with_kernels(config(), head="torch", embedding="torch"), Layout(1))
    batch = tiny_batch(0, micro_batch_size=8, weighted=True)
    placed = place(batch[0], state)
    assert placed.ahead is not None
    labels = torch.cat([placed.labels, placed.ahead.labels])
    model = state.chunks[0]
    outs = model(placed.input_ids, placed.position_ids, None, labels=labels, packed_seq_params=placed.documents)
    reported, minimised, heads, heads_minimised = outs
    alone = model(placed.input_ids, placed.position_ids, None, labels=placed.labels, packed_seq_params=placed.documents)
    assert torch.equal(alone[0], reported)
    assert placed.loss_weights is not None
    assert placed.ahead.loss_weights is not None
    tokens = placed.loss_mask.sum()
    total = (minimised * placed.loss_weights)[placed.loss_mask].sum()
    mask = placed.ahead.loss_mask
    total = total + 0.5 / 2 * (heads_minimised * placed.ahead.loss_weights)[mask].sum()
    gradients = torch.autograd.grad(total / tokens, list(model.parameters()))
    norm = float(torch.stack([gradient.norm() for gradient in gradients]).norm())
    result = train_step(state, batch, 1e-3)
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)
    assert result.loss == pytest.approx(float(reported.detach()[placed.loss_mask].mean()), rel=1e-5)
    assert result.mtp_loss == pytest.approx(float(heads.detach()[mask].mean()), rel=1e-5)
    assert int(result.source_tokens.sum()) == int(tokens), "heads are no part of the sources' losses"
    sums, counted = evaluate_step(state, batch)
    assert sums.shape == counted.shape == (2,)
    process_groups.shutdown()


def test_a_head_looks_at_nothing_that_it_is_to_predict() -> None:
    """Neither a later token nor another document's changes a head's loss, but through the label itself."""
    state = tiny_state(config(), Layout(1))
    tokens = np.random.default_rng(0).integers(0, VOCAB, (1, 33))

    def losses(tokens: np.ndarray) -> torch.Tensor:  # type: ignore[type-arg]
        (made,) = split_batch(tokens, [np.array([0, 12], np.int32)], np.array([0]), 1)
        placed = place(made, state)
        assert placed.ahead is not None
        labels = torch.cat([placed.labels, placed.ahead.labels])
        out = state.chunks[0](
            placed.input_ids, placed.position_ids, None, labels=labels, packed_seq_params=placed.documents
        )
        heads: torch.Tensor = torch.where(placed.ahead.loss_mask, out[2].detach(), 0.0)
        return heads

    before = losses(tokens)
    changed = tokens.copy()
    changed[0, 8] = (changed[0, 8] + 1) % VOCAB
    differ = losses(changed) != before
    # Head 1 predicts token 8 from 6, head 2 from 5; what is after it has read it, up to the document's end.
    assert differ[0].nonzero()[:, 0].tolist() == [6, 8, 9]
    assert differ[1].nonzero()[:, 0].tolist() == [5, 8]
    process_groups.shutdown()


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("name", "tied"), [*((name, False) for name in NAMES), ("tp2+sp", True), ("pp2", True), ("pp2 interleaved", True)]
)
def test_every_layout_has_the_single_process_curve(name: str, tied: bool) -> None:
    asked = tiny_config("llama", micro_batch_size=1, mtp=MTP, tie_embeddings=tied)
    results = run_ranks(2, tiny_steps, asked, PAIRS[name], 2, timeout_s=120)
    for ranks in zip(*results, strict=True):
        assert len({result.mtp_loss for result in ranks}) == 1
    expected = single_process(asked, 2)
    assert_same_curve(results[0], expected)
    for result, reference in zip(results[0], expected, strict=True):
        assert result.mtp_loss == pytest.approx(reference.mtp_loss, rel=1e-5)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_nothing(recompute: str) -> None:
    # Recomputed whole, a block's norms are not joined to the additions before them.
    plain, asked = (
        with_kernels(tiny_config("llama", micro_batch_size=1, mtp=MTP, recompute=how), residual_norm="torch")
        for how in ("none", recompute)
    )
    for mine, reference in zip(tiny_steps(asked, Layout(1), 2), single_process(plain, 2), strict=True):
        assert (mine.loss, mine.mtp_loss, mine.grad_norm) == (
            reference.loss,
            reference.mtp_loss,
            reference.grad_norm,
        )


def saved(run_dir: Path, asked: RunConfig) -> None:
    """A run under tensor and sequence parallelism, saved after one step."""
    state = tiny_state(asked, PAIRS["tp2+sp"])
    train_step(state, tiny_batch(0, micro_batch_size=1), 1e-3)
    data_state = State.fresh(8, ["code", "prose"]).to_dict(0, 1)
    Checkpoints(run_dir).save(state, data_state, Progress(1, 0))


@pytest.mark.multiprocess
def test_a_checkpoint_goes_on_under_another_layout_and_converts_without_heads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = config(tie_embeddings=True)
    run_ranks(2, saved, tmp_path / "run", asked, timeout_s=120)
    state = tiny_state(asked, Layout(1))
    train_step(state, tiny_batch(7, micro_batch_size=1), 1e-3)  # other weights and moments than those to be loaded
    load(Checkpoints(tmp_path / "run").path(1), state)
    result = train_step(state, tiny_batch(1, micro_batch_size=1), 1e-3)
    process_groups.shutdown()
    expected = tiny_steps(asked, Layout(1), 2)[1]
    for found, wanted in (
        (result.loss, expected.loss),
        (result.mtp_loss, expected.mtp_loss),
        (result.grad_norm, expected.grad_norm),
    ):
        assert found == pytest.approx(wanted, rel=1e-5)
    # For another format: the same tensors as of a model without heads, and a word about it.
    natives = list(native_tensors(asked.model, VOCAB))
    NativeReader(Checkpoints(tmp_path / "run").path(1), natives)
    with pytest.raises(ConfigError, match="name it with --tokenizer"):
        to_hf(tmp_path / "run", 1, tmp_path / "hf")
    said = capsys.readouterr().err
    assert "multi-token heads (model.mtp) are left out" in said
    assert said.count("\n") == 1


def test_parameters_and_identity() -> None:
    with_heads, without = config().model, tiny_config("llama", num_layers=2).model
    state = tiny_state(config(), Layout(1))
    assert count_parameters(with_heads, VOCAB) == sum(each.numel() for each in state.chunks[0].parameters())
    assert flops_per_token(with_heads, VOCAB, 32)[0] > flops_per_token(without, VOCAB, 32)[0]
    process_groups.shutdown()
    assert model_identity(with_heads, VOCAB, "fp32")["mtp"] == 2
    assert model_identity(without, VOCAB, "fp32")["mtp"] is None


def test_the_trunk_starts_as_without_heads() -> None:
    plain = tiny_state(tiny_config("llama", num_layers=2), Layout(1))
    expected = {name: weight.detach().clone() for name, weight in plain.chunks[0].named_parameters()}
    process_groups.shutdown()
    state = tiny_state(config(), Layout(1))
    own = dict(state.chunks[0].named_parameters())
    process_groups.shutdown()
    assert all(torch.equal(own[name], weight) for name, weight in expected.items())
    heads = sorted({name.split(".")[1] for name in own.keys() - expected.keys()})
    assert heads == ["layer_0", "layer_1", "norm_0", "norm_1"]
    first, second = (own[f"multi_token_heads.layer_{n}.self_attention.linear_qkv.weight"] for n in (0, 1))
    assert not torch.equal(first, second)
