"""Layouts: what fits is what divides, and the advice for what does not fit fits."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from process_group import run_ranks

from headrace.errors import ExitCode, LayoutError
from parallel import process_groups
from parallel.layout import Layout, Shape, find_problem, nearest_layouts, validate

SHAPE = Shape(
    num_layers=8,
    hidden_size=64,
    num_attention_heads=8,
    num_query_groups=4,
    ffn_hidden_size=128,
    vocab_size=256,
    seq_len=32,
    global_batch_size=16,
    micro_batch_size=1,
    lanes=240,
)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    small = st.integers(1, 6)
    return Layout(
        world_size=draw(st.integers(1, 24)),
        tensor_parallel_size=draw(small),
        sequence_parallel=draw(st.booleans()),
        pipeline_parallel_size=draw(small),
        virtual_pipeline_parallel_size=draw(st.none() | st.integers(1, 3)),
        pipeline_schedule=draw(st.sampled_from(["depth_first", "breadth_first"])),
        context_parallel_size=draw(st.integers(1, 3)),
        context_parallel_method=draw(st.sampled_from(["all_gather", "all_to_all"])),
        expert_parallel_size=draw(st.sampled_from([1, 1, 2, 3])),
        distributed_optimizer=draw(st.booleans()),
        overlap_grad_reduce=draw(st.booleans()),
        overlap_param_gather=draw(st.booleans()),
    )


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    groups = draw(st.integers(1, 6))
    heads = groups * draw(st.integers(1, 3))
    return Shape(
        num_layers=draw(st.integers(1, 12)),
        hidden_size=heads * 2 * draw(st.integers(1, 4)),
        num_attention_heads=heads,
        num_query_groups=groups,
        ffn_hidden_size=draw(st.integers(1, 48)),
        vocab_size=draw(st.integers(1, 48)),
        seq_len=draw(st.integers(1, 48)),
        global_batch_size=draw(st.integers(1, 24)),
        micro_batch_size=draw(st.integers(1, 3)),
        lanes=draw(st.integers(1, 24)),
        num_experts=draw(st.none() | st.integers(1, 6)),
        moe_shared_ffn_hidden_size=draw(st.none() | st.integers(1, 12)),
    )


def fits(layout: Layout, shape: Shape) -> bool:
    """Everything has a whole share: the rules again, as one sum of remainders."""
    tp, pp, cp = layout.tensor_parallel_size, layout.pipeline_parallel_size, layout.context_parallel_size
    if layout.world_size % (tp * pp * cp):
        return False
    virtual, dp = layout.virtual_pipeline_parallel_size, layout.world_size // (tp * pp * cp)
    remainders = [shape.num_query_groups % tp, shape.ffn_hidden_size % tp, shape.vocab_size % tp]
    remainders += [shape.num_attention_heads % tp, shape.num_layers % (pp * (virtual or 1)), shape.lanes % dp]
    remainders += [shape.global_batch_size % (dp * shape.micro_batch_size)]
    if cp > 1:
        remainders += [shape.seq_len % (2 * cp)]
    if layout.sequence_parallel:
        remainders += [tp == 1, shape.seq_len * shape.micro_batch_size // cp % tp]
    micro_batches = shape.global_batch_size // dp // shape.micro_batch_size
    if layout.pipeline_schedule == "breadth_first":
        remainders += [virtual is None, micro_batches < pp]
    elif virtual is not None:
        remainders += [micro_batches % pp]
    if virtual is not None:
        remainders += [virtual == 1, pp == 1]
    if layout.context_parallel_method == "all_to_all":
        remainders += [cp == 1, shape.num_query_groups // tp % cp]
    ep = layout.expert_parallel_size
    remainders += [dp * cp * tp % ep, ep > 1 and shape.num_experts is None]
    if shape.num_experts is not None:
        shared = shape.moe_shared_ffn_hidden_size or 0
        remainders += [shape.num_experts % ep, shared % tp, tp > 1 and not layout.sequence_parallel]
    if layout.overlap_param_gather:
        remainders += [not layout.distributed_optimizer, not layout.overlap_grad_reduce]
    return not any(remainders)


@given(layouts(), shapes())
def test_a_layout_fits_exactly_when_everything_divides(layout: Layout, shape: Shape) -> None:
    assert (find_problem(layout, shape) is None) == fits(layout, shape)


@given(layouts(), shapes())
def test_advice_fits_and_keeps_the_number_of_processes(layout: Layout, shape: Shape) -> None:
    for near in nearest_layouts(layout, shape):
        assert near.world_size == layout.world_size
        assert find_problem(near, shape) is None


@given(layouts(), shapes())
def test_the_error_is_one_line(layout: Layout, shape: Shape) -> None:
    if find_problem(layout, shape) is None:
        validate(layout, shape)
        return
    with pytest.raises(LayoutError) as caught:
        validate(layout, shape)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("parallel: ")
    assert caught.value.exit_code == ExitCode.USER_ERROR


@given(layouts())
def test_coordinates_are_a_bijection(layout: Layout) -> None:
    if layout.world_size % layout.model_parallel_size:
        return
    places = {layout.coordinates(rank) for rank in range(layout.world_size)}
    assert len(places) == layout.world_size
    assert len({dp for _, dp, _, _ in places}) == layout.data_parallel_size
    assert len(layout.rank_map().splitlines()) == layout.world_size + 1


@pytest.mark.parametrize(
    ("layout", "words", "advice"),
    [
        (
            Layout(6, tensor_parallel_size=4),
            "6 processes cannot be split",
            r"no layout fits 6 .* that do: 4 \(dp=1 tp=4",
        ),
        (
            Layout(16, tensor_parallel_size=3),
            "16 processes cannot be split",
            "that fit 16 processes: dp=4 tp=4 pp=1, dp=8 tp=2",
        ),
        (Layout(8, tensor_parallel_size=8), "num_query_groups 4 is not a multiple of tensor_parallel_size 8", "tp=4"),
        (
            Layout(3, pipeline_parallel_size=3),
            "num_layers 8 is not a multiple of pipeline_parallel_size 3",
            "no layout fits 3 processes",
        ),
        (Layout(1, sequence_parallel=True), "sequence_parallel needs tensor_parallel_size of at least 2", "tp=1"),
        (Layout(1, virtual_pipeline_parallel_size=2), "needs pipeline_parallel_size of at least 2", "pp=1"),
        (Layout(32), "global_batch_size 16 is not a multiple of the data-parallel size 32", "dp=16"),
        (Layout(0), "world_size must be at least 1", "got 0$"),
        (
            Layout(2, distributed_optimizer=True, fully_sharded=True),
            "state as well",
            "leave distributed_optimizer out$",
        ),
        (
            Layout(8, tensor_parallel_size=2, context_parallel_size=4, context_parallel_method="all_to_all"),
            "num_query_groups 4 over tensor_parallel_size 2 leaves 2, not a multiple of context_parallel_size 4, which",
            "dp=2 tp=1 pp=1 cp=4 all_to_all, dp=1 tp=2 pp=1 cp=4 all_gather",
        ),
        (Layout(2, context_parallel_method="all_to_all"), "all_to_all needs context_parallel_size", "dp=2 tp=1 pp=1,"),
        (
            Layout(8, pipeline_parallel_size=4, pipeline_schedule="breadth_first"),
            "breadth_first needs virtual_pipeline_parallel_size",
            "dp=2 tp=1 pp=4,",
        ),
        (
            Layout(32, pipeline_parallel_size=4, virtual_pipeline_parallel_size=2, pipeline_schedule="breadth_first"),
            "2 micro-batches are fewer than pipeline_parallel_size 4",
            "dp=8 tp=1 pp=4,",
        ),
        (Layout(2, expert_parallel_size=2), "expert_parallel_size 2 needs a model with num_experts", "dp=2 tp=1 pp=1,"),
        (Layout(2, overlap_param_gather=True), "needs distributed_optimizer and overlap_grad_reduce", "dp=2"),
    ],
)
def test_messages_say_what_and_what_instead(layout: Layout, words: str, advice: str) -> None:
    with pytest.raises(LayoutError, match=words) as caught:
        validate(layout, SHAPE)
    assert re.search(advice, str(caught.value))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", 7),
        ("hidden_size", 60),
        ("num_attention_heads", 3),
        ("num_query_groups", 3),
        ("ffn_hidden_size", 127),
        ("vocab_size", 255),
        ("seq_len", 31),
        ("global_batch_size", 15),
        ("micro_batch_size", 3),
        ("lanes", 239),
    ],
)
def test_every_number_alone_can_spoil_a_layout_and_is_named(field: str, value: int) -> None:
    layout = Layout(
        16, tensor_parallel_size=2, sequence_parallel=True, pipeline_parallel_size=2, context_parallel_size=2
    )
    assert find_problem(layout, SHAPE) is None
    problem = find_problem(layout, replace(SHAPE, **{field: value}))
    assert problem is not None
    assert f"{field} {value}" in problem


def test_people_are_shown_what_is_not_the_default() -> None:
    layout = Layout(
        16,
        pipeline_parallel_size=2,
        virtual_pipeline_parallel_size=2,
        pipeline_schedule="breadth_first",
        context_parallel_size=2,
        context_parallel_method="all_to_all",
        expert_parallel_size=4,
    )
    assert str(layout) == "dp=4 tp=1 pp=2x2 breadth_first cp=2 all_to_all ep=4"
    assert layout.rank_map().splitlines()[0].split() == ["rank", "pp", "dp", "cp", "tp", "ep"]
    assert [line.split()[-1] for line in layout.rank_map().splitlines()[1:]] == ["0", "1", "2", "3"] * 4
    assert str(Layout(2)) == "dp=2 tp=1 pp=1"


def test_needs_neither_torch_nor_megatron() -> None:
    code = "import sys, parallel.layout; sys.exit(any(name in sys.modules for name in ('torch', 'megatron')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.multiprocess
def test_ranks_stand_where_the_map_says() -> None:
    layout = Layout(4, tensor_parallel_size=2, pipeline_parallel_size=2, expert_parallel_size=2)

    def place() -> tuple[int, int, int, int, bool, bool]:
        ranks = process_groups.initialize(layout, seed=1, timeout_s=60)  # asserts megatron's own view of them
        stages = ranks.is_first_stage, ranks.is_last_stage
        return ranks.pp_rank, ranks.dp_rank, ranks.cp_rank, ranks.tp_rank, *stages

    found = run_ranks(4, place)
    assert [tuple(each[:4]) for each in found] == [layout.coordinates(rank) for rank in range(4)]
    assert [each[4:] for each in found] == [(True, False)] * 2 + [(False, True)] * 2
