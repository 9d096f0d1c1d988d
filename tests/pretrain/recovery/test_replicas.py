"""Replicas that drift apart are noticed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from process_group import run_ranks
from tiny_run import tiny_config, tiny_state

from parallel.layout import Layout
from pretrain.recovery.replicas import ReplicasDiffer, check_replicas, fingerprint


@given(st.integers(0, 2**31), st.sampled_from([torch.float32, torch.bfloat16]), st.data())
def test_any_flipped_bit_changes_the_fingerprint(seed: int, dtype: torch.dtype, data: st.DataObject) -> None:
    tensors = [torch.randn(7, 5, generator=torch.Generator().manual_seed(seed)).to(dtype), torch.zeros(3, dtype=dtype)]
    before = fingerprint(tensors)
    assert torch.equal(before, fingerprint([each.clone() for each in tensors]))
    words = tensors[data.draw(st.integers(0, 1))].view(-1).view(torch.uint8)
    words[data.draw(st.integers(0, words.numel() - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert not torch.equal(before, fingerprint(tensors))


def test_order_counts() -> None:
    a, b = torch.randn(4), torch.randn(4)
    assert not torch.equal(fingerprint([a, b]), fingerprint([b, a]))


def flip_on(rank: int | None, tensor_parallel: int) -> list[str]:
    state = tiny_state(tiny_config(), Layout(4, tensor_parallel_size=tensor_parallel))
    weights = [p for chunk in state.chunks for p in chunk.parameters()]
    if state.ranks.rank == rank:
        weights[2].data.view(-1).view(torch.int32)[3] ^= 1
    try:
        check_replicas(weights, 7, state.ranks.rank)
    except ReplicasDiffer as error:
        return [str(error)]
    return []


@pytest.mark.multiprocess
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_one_flipped_bit_is_found_and_its_rank_named(tensor_parallel: int) -> None:
    assert run_ranks(4, flip_on, None, tensor_parallel) == [[]] * 4
    told = run_ranks(4, flip_on, 2, tensor_parallel)
    if tensor_parallel == 1:
        assert all("weights of rank 2 are not those of the other 3 replicas" in each[0] for each in told)
    else:  # only the replicas of rank 2's part of the model can tell
        assert [len(each) for each in told] == [1, 0, 1, 0]
