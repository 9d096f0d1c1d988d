"""`train.deterministic`: the switch reaches torch and megatron-core, and an operator without a deterministic form ends
the run in one line."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny_run import tiny_config, tiny_state, tiny_steps

from headrace.errors import ConfigError
from parallel import accelerator, process_groups
from parallel.layout import Layout
from pretrain import train


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"):
        monkeypatch.delenv(name, raising=False)
    yield
    accelerator.set_deterministic(False)


def test_two_runs_are_bit_identical_and_the_switch_reaches_megatron() -> None:
    accelerator.set_deterministic(True)
    config = tiny_config("llama", kind="muon")
    first, again = (tiny_steps(config, Layout(1)) for _ in range(2))
    assert [result.source_loss_sums.tolist() for result in first] == [r.source_loss_sums.tolist() for r in again]
    assert [result.grad_norm for result in first] == [result.grad_norm for result in again]
    state = tiny_state(config, Layout(1))
    assert state.chunks[0].config.deterministic_mode
    assert state.chunks[0].embedding.word_embeddings.deterministic_mode
    process_groups.shutdown()


@pytest.mark.parametrize("wanted", [True, False])
def test_training_sets_the_switch_before_anything_else(wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def stop(*_: Any) -> None:
        seen.append(torch.are_deterministic_algorithms_enabled())
        raise KeyboardInterrupt

    monkeypatch.setattr(train.process_groups, "initialize", stop)
    accelerator.set_deterministic(not wanted)
    with pytest.raises(KeyboardInterrupt):
        train.train(tiny_config(deterministic=wanted))
    assert seen == [wanted]


def test_cublas_and_nccl_are_told_unless_they_have_been() -> None:
    import os

    os.environ["NCCL_ALGO"] = "Tree"
    accelerator.set_deterministic(True)
    assert (os.environ["CUBLAS_WORKSPACE_CONFIG"], os.environ["NCCL_ALGO"]) == (":4096:8", "Tree")


def test_an_operator_that_cannot_be_deterministic_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def use_it(*_: Any) -> Callable[[], None]:
        def go() -> None:
            torch.zeros(2).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)

        return type("Run", (), {"go": staticmethod(go), "stop_asked": False})  # type: ignore[return-value]

    monkeypatch.setattr(train, "Run", use_it)
    with pytest.raises(
        ConfigError, match=r"^train.deterministic: put_ does not have a deterministic.*; set it to false$"
    ):
        train.train(tiny_config(deterministic=True))
    process_groups.shutdown()
