"""Interleaved schedules: the order of a rank's model chunks, and how often and when their gradients are reduced."""

from itertools import groupby
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from process_group import run_ranks
from tiny_run import tiny_batch, tiny_config, tiny_state, tiny_steps

from parallel.layout import Layout, PipelineSchedule
from pretrain import evaluate
from pretrain.step import TrainState, chunk_group, train_step

MICRO_BATCHES, RANKS, CHUNKS = 8, 2, 2


def interleaved(schedule: PipelineSchedule) -> Layout:
    return Layout(
        RANKS,
        pipeline_parallel_size=RANKS,
        virtual_pipeline_parallel_size=CHUNKS,
        pipeline_schedule=schedule,
        overlap_grad_reduce=True,
    )


def watch(state: TrainState) -> list[tuple[str, int]]:
    """A list that fills with ("forward" | "backward" | "reduce", number of the chunk) as they happen."""
    events: list[tuple[str, int]] = []
    for number, (chunk, wrapped) in enumerate(zip(state.chunks, state.wrapped, strict=True)):
        chunk.register_forward_pre_hook(lambda *_, number=number: events.append(("forward", number)))
        weight = chunk.decoder.layers[0].mlp.linear_fc1.weight
        weight.register_post_accumulate_grad_hook(lambda _, number=number: events.append(("backward", number)))
        for group in wrapped.bucket_groups:

            def reduce(*args: object, number: int = number, start: object = group.start_grad_sync, **named: object):
                events.append(("reduce", number))
                return start(*args, **named)  # type: ignore[operator]

            group.start_grad_sync = reduce
    return events


def order(events: list[tuple[str, int]], kind: str) -> list[int]:
    return [number for what, number in events if what == kind]


def turns(numbers: list[int]) -> int:
    """How often one chunk's turn ends and another's begins, and once for the first."""
    return len(list(groupby(numbers)))


@pytest.mark.multiprocess
def test_breadth_first_gives_every_chunk_one_turn_and_reduces_the_last_one_early() -> None:
    config = tiny_config("llama", micro_batch_size=1)
    reference = tiny_steps(config, Layout(1), 2)

    def trace(schedule: PipelineSchedule) -> tuple[list[tuple[str, int]], list[float], list[float]]:
        state = tiny_state(config, interleaved(schedule))
        results = [train_step(state, tiny_batch(0, micro_batch_size=1), 1e-3)]
        events = watch(state)  # of the second step: the first one finds out what to wait for and reduces at its end
        results.append(train_step(state, tiny_batch(1, micro_batch_size=1), 1e-3))
        return events, [result.loss for result in results], [result.grad_norm for result in results]

    reduced = {}
    for schedule in ("depth_first", "breadth_first"):
        for events, losses, norms in run_ranks(RANKS, trace, schedule, timeout_s=120):
            assert losses == pytest.approx([one.loss for one in reference], rel=1e-5)
            assert norms == pytest.approx([one.grad_norm for one in reference], rel=1e-5)
            forward, backward = order(events, "forward"), order(events, "backward")
            runs = MICRO_BATCHES // RANKS if schedule == "depth_first" else 1
            size = MICRO_BATCHES // runs
            assert forward == ([0] * size + [1] * size) * runs
            assert backward == ([1] * size + [0] * size) * runs
            assert turns(forward) == turns(backward) == CHUNKS * runs
            # Gradients are accumulated locally, so both reduce each chunk once a step; the last chunk, whose gradients
            # are complete first, after half of the backward passes instead of after all but those of the last group.
            assert order(events, "reduce") == [1, 0]
            before = events[: events.index(("reduce", 1))]
            reduced[schedule] = len(order(before, "backward"))
    assert reduced == {"depth_first": CHUNKS * MICRO_BATCHES - RANKS, "breadth_first": MICRO_BATCHES}


@pytest.mark.multiprocess
def test_data_parallel_breadth_first_with_all_overlap_has_the_single_process_curve() -> None:
    config = tiny_config("llama", micro_batch_size=1)
    layout = Layout(
        4,
        pipeline_parallel_size=2,
        virtual_pipeline_parallel_size=2,
        pipeline_schedule="breadth_first",
        distributed_optimizer=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
    )
    results = run_ranks(4, tiny_steps, config, layout, 3, timeout_s=120)[0]
    for result, one in zip(results, tiny_steps(config, Layout(1), 3), strict=True):
        assert result.loss == pytest.approx(one.loss, rel=1e-5)
        assert result.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)


def test_the_group_follows_the_number_of_micro_batches() -> None:
    breadth, depth = interleaved("breadth_first"), interleaved("depth_first")
    assert [chunk_group(breadth, number, forward_only=False) for number in (2, 3, 8)] == [2, 3, 8]
    assert chunk_group(depth, 8, forward_only=False) == RANKS
    assert chunk_group(breadth, 8, forward_only=True) == RANKS
    assert chunk_group(breadth, 3, forward_only=True) == 3


def test_held_out_micro_batches_are_filled_up_to_what_the_schedule_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    sequence = np.arange(9), SimpleNamespace(starts=np.array([0], np.int32), weights=None)
    monkeypatch.setattr(evaluate, "_first_sequences", lambda *_: [sequence] * 5)
    config: Any = SimpleNamespace(sources=[SimpleNamespace(name="a", val_paths=["a.txt"])])
    encoder: Any = SimpleNamespace(decode=lambda tokens: "a" * len(tokens), bos_id=None)
    shares = [evaluate.HeldOut(config, encoder, 5, 1, rank, 2, multiple=4).microbatches for rank in range(2)]
    assert [len(share) for share in shares] == [4, 4]
    assert sum(int(microbatch.loss_mask.sum()) for share in shares for microbatch in share) == 5 * 8
