"""muP: what a training step does to activations does not depend on the width, and everything else it touches."""

import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from process_group import run_ranks
from tiny_run import tiny_batch, tiny_config, tiny_state, tiny_steps, with_kernels

from headrace.errors import CheckpointError, ConfigError
from parallel import process_groups
from parallel.layout import Layout
from pretrain.checkpoint import check_model, model_identity
from pretrain.config import RunConfig
from pretrain.convert.to_hf import to_hf
from pretrain.models.mup import attention_scale, lr_factor, std_factor
from pretrain.parameter_groups import factors
from pretrain.step import train_step

WIDTHS = (64, 128, 256, 512)
LR = {"adamw": 1e-2, "muon": 1e-2, "sgd": 0.1}
STEPS = 4


def config_of(width: int, mup: bool, kind: str = "adamw", **changes: Any) -> RunConfig:
    """Four heads at every width, so that head size grows with it."""
    sizes = {"hidden_size": width, "ffn_hidden_size": 2 * width, "num_layers": 2, "num_query_groups": 2}
    base = {"mup": mup, "mup_base_hidden_size": WIDTHS[0], "mup_base_head_size": WIDTHS[0] // 4}
    return tiny_config(**sizes, **base, kind=kind, lr=LR[kind], weight_decay=0.0, clip_grad=0.0, micro_batch_size=8,
                       **changes)  # fmt: skip


def changes(width: int, mup: bool, kind: str, tied: bool) -> dict[str, float]:
    """Root mean square of what STEPS steps on one batch change of that batch's activations."""
    config = with_kernels(config_of(width, mup, kind, tie_embeddings=tied), head="torch")  # fused, it has no logits
    state = tiny_state(config, Layout(1))
    seen: dict[str, torch.Tensor] = {}
    block = state.chunks[0].decoder.layers[-1]
    for name, module in (("block", block), ("mlp", block.mlp), ("logits", state.chunks[0].output_layer)):
        module.register_forward_hook(lambda *call, name=name: seen.update({name: call[2][0].detach()}))
    recorded = []
    for _ in range(STEPS + 1):
        train_step(state, tiny_batch(0, micro_batch_size=8), LR[kind])
        recorded.append(dict(seen))
    process_groups.shutdown()
    return {name: float((recorded[-1][name] - recorded[0][name]).square().mean().sqrt()) for name in seen}


@functools.cache
def slopes(mup: bool, kind: str = "adamw", tied: bool = False) -> dict[str, float]:
    """Powers of the width with which activations' changes grow."""
    measured = [changes(width, mup, kind, tied) for width in WIDTHS]
    logs = np.log2(WIDTHS)
    return {name: float(np.polyfit(logs, np.log2([each[name] for each in measured]), 1)[0]) for name in measured[0]}


@pytest.mark.parametrize("tied", [False, True])
def test_coordinate_check(tied: bool) -> None:
    with_mup, without = slopes(True, "adamw", tied), slopes(False, "adamw", tied)
    assert all(abs(slope) < 0.25 for slope in with_mup.values()), with_mup
    assert all(slope > 0.4 for slope in without.values()), without


@pytest.mark.parametrize("kind", ["muon", "sgd"])
def test_coordinate_check_of_the_other_optimizers(kind: str) -> None:
    assert all(abs(slope) < 0.25 for slope in slopes(True, kind).values()), slopes(True, kind)


def test_factors_are_those_of_table_8() -> None:
    model = config_of(256, True).model
    matrix, vector = torch.zeros(2, 2), torch.zeros(2)
    hidden, norm = "decoder.layers.0.mlp.linear_fc2.weight", "decoder.layers.0.input_layernorm.weight"
    for kind, of_hidden, of_others in (("adamw", 1 / 4, 1.0), ("sgd", 1.0, 4.0), ("muon", 1 / 2, 1.0)):
        assert lr_factor(model, kind, hidden, matrix) == of_hidden
        for name, parameter in ((norm, vector), ("output_layer.weight", matrix)):
            assert lr_factor(model, kind, name, parameter) == of_others
    assert std_factor(model, "decoder.layers.mlp.linear_fc1.weight") == 1 / 2
    head = "multi_token_heads.layer_0.mlp.linear_fc1.weight"  # a block as any other
    assert (std_factor(model, head), lr_factor(model, "adamw", head, matrix)) == (1 / 2, 1 / 4)
    assert std_factor(model, "embedding.word_embeddings.weight") == std_factor(model, "output_layer.weight") == 1.0
    assert attention_scale(model) == math.sqrt(16) / 64
    config = config_of(256, True)
    decayed = factors(config.optimizer, config.model, hidden, matrix)
    assert decayed.lr * decayed.weight_decay == 1.0
    with pytest.raises(ConfigError, match="router"):
        lr_factor(model, "adamw", "decoder.layers.0.mlp.router.weight", matrix)


def test_attention_gets_its_scale() -> None:
    # Not seen in the coordinates: queries and keys align later than in a few steps.
    attention = tiny_state(config_of(256, True), Layout(1)).chunks[0].decoder.layers[0].self_attention.core_attention
    assert attention.softmax_scale == math.sqrt(16) / 64
    process_groups.shutdown()


def test_at_the_base_width_it_changes_nothing() -> None:
    for mine, theirs in zip(*(tiny_steps(config_of(64, mup), Layout(1), 3) for mup in (True, False)), strict=True):
        assert (mine.loss, mine.grad_norm) == (theirs.loss, theirs.grad_norm)


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("adamw", Layout(2, tensor_parallel_size=2)),
        ("adamw", Layout(2, pipeline_parallel_size=2)),
        ("muon", Layout(2, tensor_parallel_size=2)),
        ("muon", Layout(2, distributed_optimizer=True)),
    ],
    ids=["tp2", "pp2", "muon, tp2", "muon, dp2 distributed optimizer"],
)
def test_every_layout_has_the_single_process_curve(kind: str, layout: Layout) -> None:
    config = tiny_config("qwen3", micro_batch_size=1, kind=kind, mup=True, mup_base_hidden_size=16,
                         mup_base_head_size=4, tie_embeddings=True)  # fmt: skip
    ranks = run_ranks(2, tiny_steps, config, layout, timeout_s=120)
    for mine, theirs in zip(ranks[0], tiny_steps(config, Layout(1)), strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-5)
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)


@pytest.mark.parametrize(("key", "value"), [("mup", False), ("mup_base_hidden_size", 32), ("mup_base_head_size", 8)])
def test_weights_of_another_base_are_refused(key: str, value: Any, tmp_path: Path) -> None:
    state = tiny_state(config_of(64, True), Layout(1))
    other = model_identity(state.config.model.model_copy(update={key: value}), 128, "fp32")
    with pytest.raises(CheckpointError, match=f"is of another model: {'mup' if key == 'mup' else key} is"):
        check_model(tmp_path, {"model": other, "weights_only": True}, state)
    process_groups.shutdown()


def test_weights_of_a_mup_model_are_refused_without_it(tmp_path: Path) -> None:
    state = tiny_state(config_of(64, False), Layout(1))
    other = model_identity(config_of(64, True).model, 128, "fp32")
    with pytest.raises(CheckpointError, match="is of another model: mup is True there and False"):
        check_model(tmp_path, {"model": other, "weights_only": True}, state)
    process_groups.shutdown()


def test_conversion_to_hugging_face_is_refused(tmp_path: Path) -> None:
    model = config_of(64, True).model
    folder = tmp_path / "run" / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    meta = {"config": {"model": model.model_dump(mode="json"), "data": {"seq_len": 32}}, "model": {"vocab_size": 128}}
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ConfigError, match=r"model\.mup: the Hugging Face format has no place"):
        to_hf(tmp_path / "run", None, tmp_path / "hf")


def test_without_mup_older_checkpoints_stay_readable() -> None:
    assert not [key for key in model_identity(tiny_config().model, 128, "fp32") if key.startswith("mup")]
