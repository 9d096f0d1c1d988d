"""Steps and runs on a part of their batches: alike under every layout, exactly accounted, bit-equal after a kill."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import child_process
import numpy as np
import pytest
import torch
from process_group import run_ranks
from tiny_run import tiny_batch, tiny_config, tiny_state, with_kernels

from data_scheduler import DataConfig
from headrace.errors import ConfigError
from parallel import process_groups
from parallel.layout import Layout
from pretrain import loop
from pretrain.config import RunConfig, validate_config
from pretrain.loss import FIXED_POINT
from pretrain.metrics import read_records
from pretrain.metrics.registry import OF_MACHINE
from pretrain.selection import Scored, Top, make_selector
from pretrain.selection.score import token_losses
from pretrain.selection.selection import Selection
from pretrain.step import StepResult, evaluate_step, place, train_step
from pretrain.train import train

LAYOUTS = {
    "dp2": Layout(2),
    "dp2 distributed optimizer": Layout(2, distributed_optimizer=True),
    "tp2+sp": Layout(2, tensor_parallel_size=2, sequence_parallel=True),
    "pp2": Layout(2, pipeline_parallel_size=2),
    "pp2 interleaved": Layout(2, pipeline_parallel_size=2, virtual_pipeline_parallel_size=2),
    "cp2": Layout(2, context_parallel_size=2),
    "dp2 tp2": Layout(4, tensor_parallel_size=2),
}


class OnlySource:
    """Documents of one source."""

    needs_reference = False

    def __init__(self, source: int) -> None:
        self.source = source

    def select(self, scored: Scored, top: Top) -> Any:
        return scored.sources == self.source


def steps(config: RunConfig, layout: Layout, selector: Any, count: int = 2, from_step: int = 0) -> list[StepResult]:
    state = tiny_state(config, layout)
    ranks = state.ranks
    selection = Selection(selector, from_step, None)
    size = config.train.micro_batch_size
    results = [
        selection.step(state, tiny_batch(step, ranks.dp_rank, ranks.dp_size, size), config.optimizer.lr, step)
        for step in range(count)
    ]
    if layout.world_size == 1:
        process_groups.shutdown()
    return results


def plain_steps(config: RunConfig, count: int) -> list[StepResult]:
    state = tiny_state(config, Layout(1))
    results = [
        train_step(state, tiny_batch(step, micro_batch_size=config.train.micro_batch_size), config.optimizer.lr)
        for step in range(count)
    ]
    process_groups.shutdown()
    return results


@pytest.mark.multiprocess
@pytest.mark.parametrize(("name", "options"), [*((name, {"share": 0.5}) for name in LAYOUTS), ("dp2", {"below": 4.86})])
def test_every_layout_chooses_the_same_and_has_the_same_curve(name: str, options: dict[str, float]) -> None:
    layout, config = LAYOUTS[name], tiny_config("llama", micro_batch_size=1)
    selector = make_selector("loss_threshold", options)
    reference = steps(config, Layout(1), selector)
    kept = [result.selected.kept_documents.sum() / result.selected.documents.sum() for result in reference]  # type: ignore[union-attr]
    assert all(0.1 < share < 0.9 for share in kept)
    for results in run_ranks(layout.world_size, steps, config, layout, selector):
        for mine, theirs in zip(results, reference, strict=True):
            assert mine.selected is not None
            assert theirs.selected is not None
            assert mine.selected.kept_documents.tolist() == theirs.selected.kept_documents.tolist()
            assert mine.selected.documents.tolist() == theirs.selected.documents.tolist()
            assert mine.selected.tokens.tolist() == theirs.selected.tokens.tolist()
            assert mine.source_tokens.tolist() == theirs.source_tokens.tolist()
            assert mine.loss == pytest.approx(theirs.loss, rel=1e-5)
            assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)


def test_keeping_everything_is_training_on_everything() -> None:
    config = tiny_config("llama")
    for mine, plain in zip(
        steps(config, Layout(1), make_selector("loss_threshold", {"below": 0})), plain_steps(config, 2), strict=True
    ):
        assert (mine.loss, mine.grad_norm) == (plain.loss, plain.grad_norm)
        assert mine.source_loss_sums.tolist() == plain.source_loss_sums.tolist()
        assert mine.selected is not None
        assert mine.selected.tokens.tolist() == plain.source_tokens.tolist()
        assert mine.selected.kept_documents.tolist() == mine.selected.documents.tolist()


def test_it_begins_at_a_step() -> None:
    config = tiny_config("llama")
    results = steps(config, Layout(1), make_selector("loss_threshold", {"share": 0.5}), 3, from_step=2)
    plain = plain_steps(config, 3)
    assert [(mine.loss, mine.grad_norm) for mine in results[:2]] == [(it.loss, it.grad_norm) for it in plain[:2]]
    assert [mine.selected is None for mine in results] == [True, True, False]
    assert results[2].loss == plain[2].loss, "losses are of the whole batch"
    assert results[2].grad_norm != plain[2].grad_norm


def test_the_gradient_is_of_the_mean_over_what_was_kept() -> None:
    # Fused, these two add to the gradient's buffer themselves.
    state = tiny_state(with_kernels(tiny_config("llama"), head="torch", embedding="torch"), Layout(1))
    batch = tiny_batch(0, micro_batch_size=1)
    total, count = torch.zeros(()), 0
    for each in batch:
        if each.source_ids[0] == 1:
            placed = place(each, state)
            _, minimised = state.chunks[0](
                placed.input_ids, placed.position_ids, None, labels=placed.labels, packed_seq_params=placed.documents
            )
            total, count = total + minimised[placed.loss_mask].sum(), count + int(placed.loss_mask.sum())
    gradients = torch.autograd.grad(total / count, list(state.chunks[0].parameters()))
    norm = float(torch.stack([gradient.norm() for gradient in gradients]).norm())
    sums, tokens = evaluate_step(state, batch)
    result = Selection(OnlySource(1), 0, None).step(state, batch, 1e-3, 0)
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)
    assert result.selected is not None
    assert result.selected.tokens.tolist() == [0, count]
    assert result.source_loss_sums.tolist() == sums.tolist()
    assert result.source_tokens.tolist() == tokens.tolist()
    assert result.loss == sums.sum() / tokens.sum() / FIXED_POINT
    process_groups.shutdown()


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ["dp2", "dp2 tp2"])
def test_a_rank_that_keeps_nothing_goes_along(name: str) -> None:
    """One rank has only source 0, the other only source 1; source 1 is kept."""
    layout, config = LAYOUTS[name], tiny_config("llama", micro_batch_size=1)

    def one_sided() -> tuple[float, list[int]]:
        state = tiny_state(config, layout)
        mine = [each for each in tiny_batch(0, micro_batch_size=1) if each.source_ids[0] == state.ranks.dp_rank][:2]
        result = Selection(OnlySource(1), 0, None).step(state, mine, 1e-3, 0)
        assert result.selected is not None
        return result.grad_norm, result.selected.tokens.tolist()

    found = run_ranks(layout.world_size, one_sided)
    assert all(each == found[0] for each in found)
    assert found[0][1][0] == 0
    assert found[0][1][1] > 0


def test_nothing_kept_is_no_update() -> None:
    state = tiny_state(tiny_config("llama"), Layout(1))
    train_step(state, tiny_batch(0), 1e-2)
    before = {name: value.clone() for name, value in state.chunks[0].named_parameters()}
    result = Selection(OnlySource(7), 0, None).step(state, tiny_batch(1), 1e-2, 1)
    assert all(torch.equal(before[name], value) for name, value in state.chunks[0].named_parameters())
    assert result.grad_norm == 0
    assert not result.skipped
    assert result.source_tokens.sum() > 0
    assert result.selected is not None
    assert not result.selected.tokens.any()
    process_groups.shutdown()


def test_losses_that_are_not_numbers_reach_the_guard() -> None:
    state = tiny_state(tiny_config("llama"), Layout(1))
    with torch.no_grad():
        state.chunks[0].decoder.final_layernorm.weight[0] = float("inf")
    result = Selection(make_selector("loss_threshold", {"below": 1.0}), 0, None).step(state, tiny_batch(1), 1e-2, 1)
    assert result.skipped
    assert np.isnan(result.loss)
    process_groups.shutdown()


def test_rho1_trains_on_the_largest_excess_losses() -> None:
    state = tiny_state(tiny_config("llama"), Layout(1))
    batch = tiny_batch(0)
    before = token_losses(state, batch)
    # A reference of the same size that has seen this batch: its losses are lower here and there.
    process_groups.shutdown()
    reference = tiny_state(tiny_config("llama", seed=7), Layout(1))
    for _ in range(5):
        train_step(reference, batch, 1e-2)
    process_groups.shutdown()
    state = tiny_state(tiny_config("llama"), Layout(1))
    mask = torch.cat([each.loss_mask for each in batch]).numpy()
    excess = (before - token_losses(reference, batch))[mask]
    count = int(np.ceil(0.6 * mask.sum()))
    result = Selection(make_selector("rho1", {"share": 0.6}), 0, reference).step(state, batch, 1e-3, 0)
    assert result.selected is not None
    assert result.selected.tokens.sum() == (excess >= np.sort(excess)[-count]).sum() == count
    process_groups.shutdown()


# -- whole runs ------------------------------------------------------------------------------------------------------


def run_config(
    data_config: Callable[..., DataConfig], folder: Path, stages: Sequence[dict[str, Any]] = (), **train_keys: Any
) -> RunConfig:
    data = data_config(seq_len=32, global_batch_size=8, lanes=8, prefetch=1).model_dump()
    model = {"family": "llama", "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 64}
    raw = {
        "run": {"dir": str(folder)},
        "model": model,
        "data": data,
        "train": {"steps": 6, "micro_batch_size": 1, "eval_sequences": 0, "threads": 1, **train_keys},
        "optimizer": {"lr": 1e-2},
        "checkpoint": {"every": 3},
        "metrics": {"progress": False},
        "stages": list(stages),
    }
    return validate_config(raw, "test")


def run_to_end(config: RunConfig) -> int:
    return child_process.run(lambda: train(config), Path(config.run.dir).with_suffix(".log"))


def records(config: RunConfig) -> list[dict[str, Any]]:
    found = read_records(Path(config.run.dir) / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key not in OF_MACHINE} for record in found]


@pytest.mark.slow
def test_runs_with_selection(data_config: Callable[..., DataConfig], tmp_path: Path) -> None:
    """Killed, or spread over ranks: what is drawn is the same as without a selection, and so is the curve."""
    plain = run_config(data_config, tmp_path / "plain")
    assert run_to_end(plain) == 0
    drawn = [(record["batch_sha256"], record["source_tokens"], record["tokens"]) for record in records(plain)]
    for name, selection in (
        ("threshold", {"kind": "loss_threshold", "options": {"share": 0.4}, "from_step": 1}),
        ("rho1", {"kind": "rho1", "options": {"share": 0.5}, "reference": str(tmp_path / "plain")}),
    ):
        whole = run_config(data_config, tmp_path / name, selection=selection)
        assert run_to_end(whole) == 0
        expected = records(whole)
        assert [(it["batch_sha256"], it["source_tokens"], it["tokens"]) for it in expected] == drawn
        assert expected[0]["source_loss"] == records(plain)[0]["source_loss"], "losses are of all that was drawn"
        assert ("trained_tokens" in expected[0]) == (name == "rho1")
        for record in expected[1:]:
            share = sum(record["trained_tokens"].values()) / sum(record["source_tokens"].values())
            assert 0.3 < share < 0.9
            assert set(record["trained_tokens"]) == set(record["source_tokens"])
            assert all(record["trained_documents"][it] <= many for it, many in record["batch_documents"].items())

        if name == "rho1":
            killed = run_config(data_config, tmp_path / f"{name}-killed", selection=selection)

            def die_at_four(killed: RunConfig = killed) -> int:
                original = loop.Run._step

                def step(self: loop.Run, *given: Any) -> None:
                    if self.done.step == 4:
                        os._exit(9)
                    original(self, *given)

                loop.Run._step = step  # type: ignore[method-assign]
                return train(killed)

            assert child_process.run(die_at_four, tmp_path / "killed.log") == 9
            assert run_to_end(killed) == 0
            assert records(killed) == expected
        else:
            spread = run_config(data_config, tmp_path / f"{name}-spread", selection=selection)
            run_ranks(2, lambda config=spread: int(train(config)))
            for mine, theirs in zip(records(spread), expected, strict=True):
                assert mine["batch_sha256"] == theirs["batch_sha256"]
                assert mine.get("trained_tokens") == theirs.get("trained_tokens")
                assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_a_reference_that_does_not_fit_is_refused(
    data_config: Callable[..., DataConfig], corpus: Path, tmp_path: Path
) -> None:
    def refused(config: RunConfig) -> str:
        log = Path(config.run.dir).with_suffix(".log")

        def attempt() -> int:
            try:
                train(config)
            except ConfigError as error:
                log.with_suffix(".said").write_text(str(error))
                return 5
            return 0

        assert child_process.run(attempt, log) == 5, log.read_text()
        said = log.with_suffix(".said").read_text()
        assert "\n" not in said
        return said

    rho1 = {"kind": "rho1", "reference": str(tmp_path / "reference")}
    assert "reference is required by rho1" in refused(
        run_config(data_config, tmp_path / "a", selection={"kind": "rho1"})
    )
    assert "uses no reference" in refused(
        run_config(data_config, tmp_path / "b", selection=rho1 | {"kind": "loss_threshold", "options": {"below": 1.0}})
    )
    assert "has no complete checkpoint" in refused(run_config(data_config, tmp_path / "c", selection=rho1))
    reference = run_config(data_config, tmp_path / "reference", steps=1)
    assert run_to_end(reference) == 0
    other = tmp_path / "other.json"
    other.write_text((corpus / "tokenizer.json").read_text() + "\n")
    config = run_config(data_config, tmp_path / "d", selection=rho1)
    config.data.tokenizer = str(other)
    assert "another tokenizer" in refused(config)


@pytest.mark.slow
def test_a_selection_goes_on_through_stages(data_config: Callable[..., DataConfig], tmp_path: Path) -> None:
    """Longer sequences, another batch and another rotary base from a step on; the reference keeps its own base."""
    stages = [{"from_step": 3, "seq_len": 64, "global_batch_size": 4, "rope_base": 50_000.0}]
    plain = run_config(data_config, tmp_path / "plain", stages)
    assert run_to_end(plain) == 0
    drawn = [(record["batch_sha256"], record["source_tokens"], record["input_tokens"]) for record in records(plain)]
    rho1 = {"kind": "rho1", "options": {"share": 0.5}, "reference": str(tmp_path / "plain")}
    run = run_config(data_config, tmp_path / "rho1", stages, selection=rho1)
    assert run_to_end(run) == 0
    found = records(run)
    assert [(record["batch_sha256"], record["source_tokens"], record["input_tokens"]) for record in found] == drawn
    assert all(sum(record["trained_tokens"].values()) < sum(record["source_tokens"].values()) for record in found)
