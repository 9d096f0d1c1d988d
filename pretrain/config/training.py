"""What a run does with its model: the `train`, `optimizer`, `parallel` and `checkpoint` sections."""

from typing import Annotated, Any, Literal

from pydantic import Field

from data_scheduler.config import StrictModel
from pretrain.config.numbers import NonNegative, NonNegativeFloat, Positive, PositiveFloat


class SelectionConfig(StrictModel):
    """What is trained on among the documents of a batch; which batch comes next never depends on it. A forward pass
    over the whole batch comes first, so a step costs a third more, less what is left out."""

    kind: str
    """`loss_threshold`, `rho1`, or a name in the entry-point group `headrace.selectors`."""
    options: dict[str, Any] = {}
    """Handed to the selector as keyword arguments."""
    from_step: NonNegative = 0
    """First step with a selection; before it everything is trained on."""
    reference: str | None = None
    """Run folder, or folder of one checkpoint, of the model that gives reference losses; for selectors that need it."""


class TrainConfig(StrictModel):
    """The training loop."""

    steps: Positive
    """Optimizer steps of the run."""
    micro_batch_size: Positive = 1
    """Sequences per forward pass and data-parallel rank."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16` keeps fp32 master weights and gradients."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation: none, core attention and MLP only, or every block."""
    seed: int = 1234
    """Seed of the weights."""
    eval_every: NonNegative = 0
    """Evaluate held-out data every so many steps, besides before the first and after the last; 0: only those two."""
    eval_sequences: NonNegative = 16
    """Held-out sequences per source in one evaluation; 0 switches evaluation off."""
    selection: SelectionConfig | None = None
    """Train on a part of each batch only; null: on all of it."""
    threads: NonNegative = 0
    """CPU threads per process; 0 leaves torch's own choice."""


class OptimizerConfig(StrictModel):
    """AdamW and its learning-rate schedule."""

    kind: Literal["adamw"] = "adamw"
    lr: PositiveFloat = 3e-4
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 3e-5
    """Learning rate at the end of the decay."""
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    """Applied to matrices; norms and biases are not decayed."""
    clip_grad: NonNegativeFloat = 1.0
    """Global gradient-norm limit; 0 switches clipping off."""
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    """Shape after the warm-up; `wsd` holds the peak and decays over the last `decay_steps` steps."""
    warmup_steps: NonNegative = 0
    """Steps of linear warm-up from 0."""
    decay_steps: NonNegative | None = None
    """`cosine`, `linear`: step at which min_lr is reached (default: the run's end). `wsd`: length of the final decay
    (default: a tenth of the run)."""


class ParallelConfig(StrictModel):
    """How the model is spread over processes; what is left over is data parallel."""

    tensor_parallel_size: Positive = 1
    sequence_parallel: bool = False
    """Split norms and residuals over the tensor-parallel group along the sequence."""
    pipeline_parallel_size: Positive = 1
    virtual_pipeline_parallel_size: Positive | None = None
    """Model chunks per pipeline rank (interleaved schedule)."""
    pipeline_schedule: Literal["depth_first", "breadth_first"] = "depth_first"
    """Order of a pipeline rank's model chunks: change the chunk after every `pipeline_parallel_size` micro-batches, or
    only after all of them (arXiv 2211.05953: more activations are held, and gradients can be reduced earlier)."""
    context_parallel_size: Positive = 1
    """Ranks that share the tokens of each sequence."""
    context_parallel_method: Literal["all_gather", "all_to_all"] = "all_gather"
    """What attention does under context parallelism: gather all keys and values (arXiv 2407.21783, section 3.3.2), or
    swap tokens for heads, so that each rank has whole documents of some heads (Ulysses, arXiv 2309.14509; the
    key/value heads over `tensor_parallel_size` must be a multiple of `context_parallel_size`)."""
    expert_parallel_size: Positive = 1
    """Ranks of a pipeline stage over which the experts of each layer are spread, each expert whole."""
    distributed_optimizer: bool = False
    """Shard optimizer state over data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over data-parallel ranks while the backward pass still computes others."""
    overlap_param_gather: bool = False
    """Gather updated weights while the next forward pass already uses others; needs `distributed_optimizer` and
    `overlap_grad_reduce`."""


class CheckpointConfig(StrictModel):
    """When checkpoints are written and how many are kept."""

    every: NonNegative = 100
    """Save every so many steps, and at the end; 0: only at the end."""
    keep_last: NonNegative = 2
    """Checkpoints kept; 0 keeps all."""
