"""SGD, gradient clipping (SGD shows it; Adam forgives any factor), and both under every layout."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from process_group import run_ranks
from resharding import load_then_go_on, save_then_go_on
from tiny_run import PAIRS, assert_same_curve, single_process, tiny_batch, tiny_config, tiny_state, tiny_steps

from headrace.errors import CheckpointError
from parallel import process_groups
from parallel.layout import Layout
from pretrain import checkpoint, checkpoint_saving
from pretrain.step import train_step

NAMES = ("dp2", "dp2 distributed optimizer", "tp2+sp", "pp2", "cp2")
CLIP, LR = 0.25, 1.0


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_step_is_torchs_sgd(nesterov: bool) -> None:
    config = tiny_config("wonton", kind="sgd", momentum=0.8, nesterov=nesterov, weight_decay=0.5, clip_grad=0.0)
    state = tiny_state(config, Layout(1))
    names = dict(state.chunks[0].named_parameters())
    copies = {name: value.detach().clone().requires_grad_() for name, value in names.items()}
    groups = [
        {"params": [value for value in copies.values() if value.dim() == dim], "weight_decay": 0.5 * (dim > 1)}
        for dim in (1, 2)
    ]
    reference = torch.optim.SGD(groups, lr=1e-2, momentum=0.8, nesterov=nesterov)
    for step in range(3):
        train_step(state, tiny_batch(step), 1e-2)
        for name, copy in copies.items():
            copy.grad = names[name].main_grad.clone()
        reference.step()
    for name, copy in copies.items():
        torch.testing.assert_close(names[name], copy, rtol=1e-5, atol=1e-6)
    process_groups.shutdown()


@pytest.mark.multiprocess
@pytest.mark.parametrize(("name", "tied"), [*((name, False) for name in NAMES), ("tp2+sp", True), ("pp2", True)])
def test_clipping_is_by_the_norm_of_the_whole_gradient_under_every_layout(name: str, tied: bool) -> None:
    config = tiny_config("qwen3", micro_batch_size=1, kind="sgd", momentum=0.0, lr=LR, weight_decay=0.0,
                         clip_grad=CLIP, tie_embeddings=tied)  # fmt: skip
    reference = single_process(config, 4)
    assert min(result.grad_norm for result in reference) > 2 * CLIP
    assert_same_curve(run_ranks(2, tiny_steps, config, PAIRS[name], 4, timeout_s=120)[0], reference)


@pytest.mark.parametrize("tied", [False, True])
def test_a_clipped_update_is_as_long_as_the_limit(tied: bool) -> None:
    config = tiny_config(kind="sgd", momentum=0.0, weight_decay=0.0, clip_grad=CLIP, tie_embeddings=tied)
    state = tiny_state(config, Layout(1))
    parameters = list(state.chunks[0].parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    result = train_step(state, tiny_batch(0), 1e-2)
    assert result.grad_norm > 2 * CLIP
    moved = torch.stack([(a - b).norm() for a, b in zip(before, parameters, strict=True)]).norm()
    assert float(moved) == pytest.approx(1e-2 * CLIP, rel=1e-3)
    process_groups.shutdown()


@pytest.mark.multiprocess
def test_momentum_in_bf16_survives_a_change_of_layout(tmp_path: Path) -> None:
    config = tiny_config("llama", micro_batch_size=1, kind="sgd", lr=0.1, precision="bf16")
    owned = Layout(2, distributed_optimizer=True)
    expected = run_ranks(2, save_then_go_on, config, owned, tmp_path / "a", 3, 2, timeout_s=120)[0]
    again = run_ranks(2, load_then_go_on, config, owned, tmp_path / "a", 3, 2, timeout_s=120)[0]
    assert [result.loss for result in again] == [result.loss for result in expected]
    other = run_ranks(2, load_then_go_on, config, PAIRS["tp2+sp"], tmp_path / "a", 3, 2, timeout_s=120)
    assert other[0][1].loss == pytest.approx(expected[1].loss, rel=2e-3)  # bf16 adds in another order


def test_momentum_does_not_begin_in_the_middle_of_a_run(tmp_path: Path) -> None:
    state = tiny_state(tiny_config(kind="sgd", momentum=0.9), Layout(1))
    saved = {"optimizer": {"kind": "sgd", "groups": []}, "config": {"optimizer": {"momentum": 0.0}}, "model": {}}
    with pytest.raises(CheckpointError, match=r"saved with optimizer\.momentum=0, .*; set it to 0, or start a new run"):
        checkpoint.check_model(tmp_path, saved, state)
    process_groups.shutdown()


@pytest.mark.parametrize(("kind", "precision"), [("sgd", "bf16"), ("muon", "fp32")])
def test_a_checkpoint_is_loaded_with_and_without_owners(
    kind: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The position of the data is another test's business.
    monkeypatch.setattr(checkpoint_saving, "save_state", lambda *_: None)
    monkeypatch.setattr(checkpoint, "load_state", lambda _: {})
    monkeypatch.setattr(checkpoint, "Snapshots", lambda _: SimpleNamespace(save=lambda _: None))
    config = tiny_config(kind=kind, precision=precision)
    state = tiny_state(config, Layout(1))
    train_step(state, tiny_batch(0), 1e-2)
    path = checkpoint.Checkpoints(tmp_path).save(state, {}, checkpoint.Progress(1, 0))
    expected = train_step(state, tiny_batch(1), 1e-2), train_step(state, tiny_batch(2), 1e-2)
    process_groups.shutdown()
    state = tiny_state(config, Layout(1, distributed_optimizer=True))
    checkpoint.load(path, state)
    for step, before in enumerate(expected, start=1):
        assert train_step(state, tiny_batch(step), 1e-2).loss == before.loss
    process_groups.shutdown()
