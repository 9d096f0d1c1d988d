"""What a run does with its model: the `train`, `optimizer`, `parallel` and `checkpoint` sections."""

from typing import Annotated, Any, Literal

from pydantic import Field

from data_scheduler.config import StrictModel
from pretrain.config.learning_rate import LearningRateConfig
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


class OptimizerConfig(LearningRateConfig):
    """AdamW and its learning-rate schedule."""

    kind: Literal["adamw"] = "adamw"
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    """Applied to matrices; norms and biases are not decayed."""
    clip_grad: NonNegativeFloat = 1.0
    """Global gradient-norm limit; 0 switches clipping off."""


class ParallelConfig(StrictModel):
    """How the model is spread over processes; what is left over is data parallel."""

    tensor_parallel_size: Positive = 1
    sequence_parallel: bool = False
    """Split norms and residuals over the tensor-parallel group along the sequence."""
    pipeline_parallel_size: Positive = 1
    virtual_pipeline_parallel_size: Positive | None = None
    """Model chunks per pipeline rank (interleaved schedule)."""
    context_parallel_size: Positive = 1
    distributed_optimizer: bool = False
    """Shard optimizer state over data-parallel ranks (ZeRO-1)."""


class CheckpointConfig(StrictModel):
    """When checkpoints are written and how many are kept."""

    every: NonNegative = 100
    """Save every so many steps, and at the end; 0: only at the end."""
    keep_last: NonNegative = 2
    """Checkpoints kept; 0 keeps all."""
