"""What a run does with its model: the `train`, `optimizer`, `parallel` and `checkpoint` sections."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

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
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """`bf16` and `fp16` keep fp32 master weights and gradients; `fp16` scales the loss, see `initial_loss_scale`."""
    initial_loss_scale: PositiveFloat = 4096.0
    """With `fp16`: factor of the loss at the start. A step whose gradients overflow is skipped and halves it."""
    loss_scale_window: Positive = 1000
    """With `fp16`: steps without an overflow after which the factor doubles."""
    deterministic: bool = False
    """Only operators that give the same bits every time; an operator without such a form ends the run with its name.
    On CPU, where repeated runs are bit-identical anyway, it guards against operators that are not."""
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


class ParameterGroup(StrictModel):
    """Settings of some of the parameters."""

    match: Annotated[str, Field(min_length=1)]
    """Shell pattern over names in checkpoints, as `decoder.layers.0.*` or `*.linear_fc2.weight`; layers count from 0
    over the whole model. A pattern that no parameter has is refused."""
    weight_decay: NonNegativeFloat | None = None
    """Instead of `optimizer.weight_decay`, for norms and biases too."""
    lr_scale: NonNegativeFloat = 1.0
    """Factor of the learning rate; 0 keeps the parameters as they are."""


class OptimizerConfig(LearningRateConfig):
    """The optimizer and its learning-rate schedule."""

    kind: Literal["adamw", "sgd", "muon"] = "adamw"
    """`sgd`: with momentum. `muon`: for the blocks' matrices, scaled to AdamW's update size (arXiv 2502.16982), and
    AdamW for embeddings, head, norms and biases. A run keeps its kind for life."""
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Decay of the gradient's running mean; `adamw`, and AdamW's part of `muon`."""
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    """Decay of the squared gradient's running mean; `adamw`, and AdamW's part of `muon`."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the squared gradient's mean; `adamw`, and AdamW's part of `muon`."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    """`sgd` and `muon`: what is kept of the sum of gradients from step to step."""
    nesterov: bool = True
    """`sgd` and `muon`: look one step ahead."""
    weight_decay: NonNegativeFloat = 0.1
    """Applied to matrices; norms and biases are not decayed. `adamw` and `muon` take lr times it off the weights, `sgd`
    adds it times the weights to the gradient."""
    groups: list[ParameterGroup] = []
    """Parameters with settings of their own; of several that match a parameter, the first counts."""
    clip_grad: NonNegativeFloat = 1.0
    """Global gradient-norm limit; 0 switches clipping off."""

    @model_validator(mode="after")
    def _decay_of_groups_has_a_measure(self) -> "OptimizerConfig":
        # Checkpoints tell groups apart by their decay's ratio to the common one.
        if self.weight_decay == 0.0 and any(group.weight_decay for group in self.groups):
            raise ValueError(
                "weight_decay is 0 while a group has one; set weight_decay too, and let a last group of match: '*' "
                "with weight_decay: 0 stand for all other parameters"
            )
        return self


class ParallelConfig(StrictModel):
    """How the model is spread over processes; what is left over is data parallel."""

    tensor_parallel_size: Positive = 1
    """Ranks over which every matrix, the heads and the vocabulary are split."""
    sequence_parallel: bool = False
    """Split norms and residuals over the tensor-parallel group along the sequence."""
    pipeline_parallel_size: Positive = 1
    """Ranks over which the layers are spread."""
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
    fully_sharded: bool = False
    """Shard weights, gradients and optimizer state over data- and context-parallel ranks (ZeRO-3, torch's FSDP2); not
    together with `distributed_optimizer`."""
    reduce_gradients: Literal["step", "micro_batch"] = "step"
    """With `fully_sharded`: sum gradients over ranks once a step, which keeps whole gradients (fp32, 4 bytes a weight)
    from one micro-batch to the next, or after each micro-batch, which keeps shards alone and sends more."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over data-parallel ranks while the backward pass still computes others."""
    overlap_param_gather: bool = False
    """Gather updated weights while the next forward pass already uses others; needs `distributed_optimizer` and
    `overlap_grad_reduce`."""

    @model_validator(mode="after")
    def _reduces_shards(self) -> Self:
        if self.reduce_gradients == "micro_batch" and not self.fully_sharded:
            raise ValueError("reduce_gradients: micro_batch goes with fully_sharded: true; leave it out")
        return self


class CheckpointConfig(StrictModel):
    """When checkpoints are written and how many are kept."""

    every: NonNegative = 100
    """Save every so many steps, and at the end; 0: only at the end."""
    behind: bool = True
    """Write while training goes on: a step waits only until the state has been copied. Needs memory for the copy: on a
    GPU machine that of the host, on a CPU that of the pages which training changes meanwhile."""
    keep_last: NonNegative = 2
    """Newest checkpoints kept; 0 keeps all."""
    keep_every: NonNegative = 0
    """Keep those whose step is a multiple of this as well; 0: no more than `keep_last`."""
    max_total_gb: Annotated[float, Field(ge=0)] = 0.0
    """Remove the oldest while all together are larger than this many GB (10^9 bytes); the newest always stays; 0: no
    limit."""
    verify: bool = True
    """Before a checkpoint is loaded, compare its files with the checksums written with it; when they differ, set it
    aside and go on from the one before."""
    copy_to: str | None = None
    """A folder, or a URL that fsspec knows (`s3://bucket/cod`), of this run alone: finished checkpoints are copied
    there by a process beside the run, and a run that lacks them, or finds them damaged, fetches them from there."""
    copy_keep_last: NonNegative = 2
    """Newest copies kept in `copy_to`, and with them those of `keep_every`; 0 keeps all."""
    copy_wait_s: Annotated[float, Field(ge=0)] = 600.0
    """Seconds for which the end of the run, or a signal's exit, waits for a copy that is being made."""
