"""A layout: how many processes, and how the model is split over them. Pure arithmetic, no torch.

`Layout(8, tensor_parallel_size=2, pipeline_parallel_size=2)` leaves data parallel 2. `validate` holds a layout
against a model's numbers and says in one line what does not divide and which nearby layouts would.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal, NamedTuple

from headrace.errors import LayoutError

ContextParallelMethod = Literal["all_gather", "all_to_all"]
PipelineSchedule = Literal["depth_first", "breadth_first"]
ReduceGradients = Literal["step", "micro_batch"]


@dataclass(frozen=True)
class Layout:
    """How `world_size` processes share one model. Ranks count tensor parallel fastest, then context, data, pipeline.

    Expert parallelism takes no processes of its own: within a pipeline stage, neighbours in rank order hold different
    experts, each of them whole, whatever the tensor parallel size.
    """

    world_size: int
    tensor_parallel_size: int = 1
    sequence_parallel: bool = False
    pipeline_parallel_size: int = 1
    virtual_pipeline_parallel_size: int | None = None
    pipeline_schedule: PipelineSchedule = "depth_first"
    context_parallel_size: int = 1
    context_parallel_method: ContextParallelMethod = "all_gather"
    expert_parallel_size: int = 1
    distributed_optimizer: bool = False
    fully_sharded: bool = False
    reduce_gradients: ReduceGradients = "step"
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one replica together."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.context_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """Replicas of the model."""
        return self.world_size // self.model_parallel_size

    @property
    def model_chunks(self) -> int:
        """Model chunks on each pipeline rank."""
        return self.virtual_pipeline_parallel_size or 1

    def coordinates(self, rank: int) -> tuple[int, int, int, int]:
        """(pipeline, data, context, tensor) position of `rank`."""
        tp, cp, dp = self.tensor_parallel_size, self.context_parallel_size, self.data_parallel_size
        return rank // (tp * cp * dp), rank // (tp * cp) % dp, rank // tp % cp, rank % tp

    def expert_rank(self, rank: int) -> int:
        """Which share of the experts `rank` holds."""
        return rank % self.expert_parallel_size

    def rank_map(self) -> str:
        """One line a rank: where it stands in the pipeline, data, context and tensor directions, and which share of the
        experts it holds where these are split."""
        experts = self.expert_parallel_size > 1
        lines = [f"{'rank':>5} {'pp':>3} {'dp':>3} {'cp':>3} {'tp':>3}" + " ep".rjust(4) * experts]
        for rank in range(self.world_size):
            pp, dp, cp, tp = self.coordinates(rank)
            lines.append(f"{rank:>5} {pp:>3} {dp:>3} {cp:>3} {tp:>3}" + f" {self.expert_rank(rank):>3}" * experts)
        return "\n".join(lines)

    def __str__(self) -> str:
        parts = [f"dp={self.data_parallel_size}", f"tp={self.tensor_parallel_size}{'+sp' * self.sequence_parallel}"]
        virtual = self.virtual_pipeline_parallel_size
        parts.append(f"pp={self.pipeline_parallel_size}" + (f"x{virtual} {self.pipeline_schedule}" if virtual else ""))
        if self.context_parallel_size > 1:
            parts.append(f"cp={self.context_parallel_size} {self.context_parallel_method}")
        if self.expert_parallel_size > 1:
            parts.append(f"ep={self.expert_parallel_size}")
        return " ".join(parts)


class BatchShape(NamedTuple):
    """A stage's batch."""

    name: str
    """What to call the stage in errors."""
    seq_len: int
    global_batch_size: int | None
    """None: held-out data, whose last micro-batches are filled up."""
    micro_batch_size: int


@dataclass(frozen=True)
class Shape:
    """The numbers of a model and its batch that a layout has to divide."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    ffn_hidden_size: int
    vocab_size: int
    seq_len: int
    global_batch_size: int
    micro_batch_size: int
    lanes: int
    head_size: int | None = None
    """Width of one head; None: hidden_size / num_attention_heads."""
    later: tuple[BatchShape, ...] = ()
    """Batches besides this first one: of stages to come, and held-out data."""
    num_experts: int | None = None
    """None: the MLPs are dense, of `ffn_hidden_size`."""
    moe_shared_ffn_hidden_size: int | None = None
    """Inner width of the expert that every token goes through, which tensor parallelism splits; None: there is none."""


def validate(layout: Layout, shape: Shape) -> None:
    """Raise LayoutError, one line with the nearest layouts that fit, unless `layout` can train `shape`."""
    problem = find_problem(layout, shape)
    if problem is None:
        return
    raise LayoutError(f"parallel: {problem}{_advice(layout, shape)}")


def find_problem(layout: Layout, shape: Shape) -> str | None:
    """What keeps `layout` from training `shape`, or None."""
    return _own_problem(layout) or _model_problem(layout, shape) or _batch_problem(layout, shape)


def nearest_layouts(layout: Layout, shape: Shape, limit: int = 3) -> list[Layout]:
    """Up to `limit` layouts of the same number of processes that fit, the fewest changes from `layout` first."""
    fitting = [near for near in _neighbours(layout, shape) if find_problem(near, shape) is None]

    def distance(near: Layout) -> tuple[float, tuple[int, ...]]:
        ratio = sum(max(a, b) / min(a, b) - 1 for a, b in zip(_sizes(near), _sizes(layout), strict=True))
        kept = (
            near.virtual_pipeline_parallel_size == layout.virtual_pipeline_parallel_size,
            near.pipeline_schedule == layout.pipeline_schedule,
            near.context_parallel_method == layout.context_parallel_method,
        )
        return ratio + kept.count(False), _sizes(near)

    return sorted(fitting, key=distance)[:limit]


def _sizes(layout: Layout) -> tuple[int, ...]:
    return (
        layout.tensor_parallel_size,
        layout.pipeline_parallel_size,
        layout.context_parallel_size,
        layout.expert_parallel_size,
    )


def _advice(layout: Layout, shape: Shape) -> str:
    """The end of an error: layouts of as many processes that fit, or else numbers of processes that have one."""
    near = nearest_layouts(layout, shape)
    if near:
        return f"; layouts that fit {_processes(layout.world_size)}: {', '.join(map(str, near))}"
    sizes = sorted(range(1, layout.world_size + 33), key=lambda size: abs(size - layout.world_size))[:64]
    others = []
    for size in sizes:
        for other in nearest_layouts(replace(layout, world_size=size), shape, limit=1):
            others.append(f"{size} ({other})")
        if len(others) == 2:
            break
    if not others or layout.world_size < 1:  # no number of processes mends it, or any does
        return ""
    return f"; no layout fits {_processes(layout.world_size)}; numbers of processes that do: {', '.join(others)}"


def _processes(number: int) -> str:
    return "1 process" if number == 1 else f"{number} processes"


def _own_problem(layout: Layout) -> str | None:
    sizes = {
        "world_size": layout.world_size,
        "tensor_parallel_size": layout.tensor_parallel_size,
        "pipeline_parallel_size": layout.pipeline_parallel_size,
        "context_parallel_size": layout.context_parallel_size,
        "expert_parallel_size": layout.expert_parallel_size,
    }
    for name, size in sizes.items():
        if size < 1:
            return f"{name} must be at least 1, got {size}"
    if layout.world_size % layout.model_parallel_size:
        return (
            f"{_processes(layout.world_size)} cannot be split into tensor_parallel_size "
            f"{layout.tensor_parallel_size} x pipeline_parallel_size {layout.pipeline_parallel_size} x "
            f"context_parallel_size {layout.context_parallel_size} = {layout.model_parallel_size}"
        )
    if layout.sequence_parallel and layout.tensor_parallel_size == 1:
        return "sequence_parallel needs tensor_parallel_size of at least 2"
    if layout.fully_sharded and layout.distributed_optimizer:
        return "fully_sharded shards the optimizer's state as well; leave distributed_optimizer out"
    if layout.fully_sharded and layout.overlap_grad_reduce:
        return "fully_sharded overlaps its reductions and gathers by itself; leave overlap_grad_reduce out"
    if layout.fully_sharded and layout.expert_parallel_size > 1:
        return "fully_sharded and expert_parallel_size do not go together"
    virtual = layout.virtual_pipeline_parallel_size
    if virtual is not None and virtual < 2:
        return f"virtual_pipeline_parallel_size must be at least 2 or left out, got {virtual}"
    if virtual is not None and layout.pipeline_parallel_size == 1:
        return "virtual_pipeline_parallel_size needs pipeline_parallel_size of at least 2"
    if layout.pipeline_schedule == "breadth_first" and virtual is None:
        return "pipeline_schedule breadth_first needs virtual_pipeline_parallel_size of at least 2"
    if layout.context_parallel_method == "all_to_all" and layout.context_parallel_size == 1:
        return "context_parallel_method all_to_all needs context_parallel_size of at least 2"
    stage = layout.world_size // layout.pipeline_parallel_size
    if stage % layout.expert_parallel_size:
        return (
            f"expert_parallel_size {layout.expert_parallel_size} does not divide the {_processes(stage)} "
            "of a pipeline stage"
        )
    if layout.overlap_param_gather and not (layout.distributed_optimizer and layout.overlap_grad_reduce):
        return "overlap_param_gather needs distributed_optimizer and overlap_grad_reduce"
    return None


def _model_problem(layout: Layout, shape: Shape) -> str | None:
    tp = layout.tensor_parallel_size
    if shape.head_size is None and shape.hidden_size % shape.num_attention_heads:
        return f"hidden_size {shape.hidden_size} is not a multiple of num_attention_heads {shape.num_attention_heads}"
    head_size = shape.head_size or shape.hidden_size // shape.num_attention_heads
    if head_size % 2:
        return f"head size {head_size} is odd, rotary embedding needs an even one"
    if shape.num_attention_heads % shape.num_query_groups:
        return (
            f"num_attention_heads {shape.num_attention_heads} is not a multiple of "
            f"num_query_groups {shape.num_query_groups}"
        )
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_size"):
        size = getattr(shape, name)
        if size % tp:
            return f"{name} {size} is not a multiple of tensor_parallel_size {tp}"
    cp = layout.context_parallel_size
    if layout.context_parallel_method == "all_to_all" and shape.num_query_groups // tp % cp:
        return (
            f"num_query_groups {shape.num_query_groups} over tensor_parallel_size {tp} leaves "
            f"{shape.num_query_groups // tp}, not a multiple of context_parallel_size {cp}, which "
            "context_parallel_method all_to_all needs"
        )
    stages = layout.pipeline_parallel_size * layout.model_chunks
    if shape.num_layers % stages:
        virtual = layout.virtual_pipeline_parallel_size
        needed = f"pipeline_parallel_size {layout.pipeline_parallel_size}"
        needed += f" x virtual_pipeline_parallel_size {virtual}" if virtual else ""
        return f"num_layers {shape.num_layers} is not a multiple of {needed}"
    return _expert_problem(layout, shape)


def _expert_problem(layout: Layout, shape: Shape) -> str | None:
    tp, ep = layout.tensor_parallel_size, layout.expert_parallel_size
    if shape.num_experts is None:
        return f"expert_parallel_size {ep} needs a model with num_experts" if ep > 1 else None
    if shape.num_experts % ep:
        return f"num_experts {shape.num_experts} is not a multiple of expert_parallel_size {ep}"
    shared = shape.moe_shared_ffn_hidden_size or 0
    if shared % tp:
        return f"moe_shared_ffn_hidden_size {shared} is not a multiple of tensor_parallel_size {tp}"
    if tp > 1 and not layout.sequence_parallel:
        return f"num_experts {shape.num_experts} with tensor_parallel_size {tp} needs sequence_parallel"
    return None


def _batch_problem(layout: Layout, shape: Shape) -> str | None:
    for batch in (BatchShape("", shape.seq_len, shape.global_batch_size, shape.micro_batch_size), *shape.later):
        problem = _stage_problem(layout, batch)
        if problem is not None:
            return f"{batch.name}: {problem}" if batch.name else problem
    if shape.lanes % layout.data_parallel_size:
        return f"lanes {shape.lanes} is not a multiple of the data-parallel size {layout.data_parallel_size}"
    return None


def _stage_problem(layout: Layout, shape: BatchShape) -> str | None:
    dp, cp, micro = layout.data_parallel_size, layout.context_parallel_size, shape.micro_batch_size
    batch = dp * micro if shape.global_batch_size is None else shape.global_batch_size
    if batch % dp:
        return f"global_batch_size {batch} is not a multiple of the data-parallel size {dp}"
    if batch // dp % micro:
        return (
            f"global_batch_size {batch} over data-parallel size {dp} leaves "
            f"{batch // dp} sequences, not a multiple of micro_batch_size {micro}"
        )
    if cp > 1 and shape.seq_len % (2 * cp):
        return f"seq_len {shape.seq_len} is not a multiple of 2 x context_parallel_size {cp}"
    if layout.sequence_parallel and shape.seq_len // cp * micro % layout.tensor_parallel_size:
        return (
            f"micro_batch_size x seq_len = {shape.seq_len // cp * micro} tokens are not a multiple of "
            f"tensor_parallel_size {layout.tensor_parallel_size}, which sequence_parallel needs"
        )
    if layout.virtual_pipeline_parallel_size and shape.global_batch_size is not None:
        micro_batches, pp = batch // dp // micro, layout.pipeline_parallel_size
        if layout.pipeline_schedule == "breadth_first":
            if micro_batches < pp:
                return (
                    f"{micro_batches} micro-batches are fewer than pipeline_parallel_size {pp}, "
                    "which pipeline_schedule breadth_first needs"
                )
        elif micro_batches % pp:
            return (
                f"{micro_batches} micro-batches are not a multiple of pipeline_parallel_size {pp}, "
                "which the interleaved schedule needs"
            )
    return None


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _neighbours(layout: Layout, shape: Shape) -> Iterator[Layout]:
    """Layouts of the same number of processes: every tensor, pipeline and expert parallel size, and of context
    parallelism, virtual stages and their options either what was asked for or none."""
    if layout.world_size < 1:
        return
    experts = _divisors(layout.world_size) if layout.expert_parallel_size > 1 else [1]
    cps = dict.fromkeys((1, layout.context_parallel_size))  # not sets: the order of advice is the same in every process
    methods = dict.fromkeys(("all_gather", layout.context_parallel_method))
    schedules = dict.fromkeys(("depth_first", layout.pipeline_schedule))
    for tp in _divisors(layout.world_size):
        for pp in _divisors(layout.world_size // tp):
            virtuals = dict.fromkeys((None, layout.virtual_pipeline_parallel_size if pp > 1 else None))
            for cp, method, virtual, schedule, ep in product(cps, methods, virtuals, schedules, experts):
                yield replace(
                    layout,
                    tensor_parallel_size=tp,
                    pipeline_parallel_size=pp,
                    context_parallel_size=cp,
                    context_parallel_method=method,
                    virtual_pipeline_parallel_size=virtual,
                    pipeline_schedule=schedule,
                    expert_parallel_size=ep,
                    sequence_parallel=tp > 1 and (layout.sequence_parallel or shape.num_experts is not None),
                    overlap_param_gather=layout.overlap_param_gather
                    and layout.distributed_optimizer
                    and layout.overlap_grad_reduce,
                )
