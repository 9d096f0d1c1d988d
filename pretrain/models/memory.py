"""How many bytes a run needs on each rank: pure arithmetic on a model, a layout and a batch.

    weights      numel · itemsize                                          exact
    gradients    numel · 4: buffers are fp32 in every precision            exact
    optimizer    AdamW: 8 bytes a parameter, under bf16 and fp16 12, shared out or not; see `standing_memory.py`, also
                 for SGD, Muon, experts and fully sharded weights
    activations  what autograd keeps of a block for one token, times layers, tokens and micro-batches in flight
    logits       float32[tokens, vocabulary / tp], in half precision a copy in it while they are made, or those of one
                 chunk of the fused head; and the last norm's input and output
    recomputed   what one block makes again in the backward pass
    inputs       all micro-batches of a step, with the cosines and sines of their positions

The activations are counted as Korthikanti et al. do (arXiv 2205.05198, section 4), operator by operator, for our parts:
no dropout masks; flash attention, so no [seq, seq] scores (their 5·a·s/h is 0); the fused query-key-value output stays,
because v is a view of it, beside rotated queries and keys; SwiGLU or GELU; norms and residuals split over the
tensor-parallel group only with sequence parallelism. Pipelines keep as many micro-batches as their schedule has in
flight (1F1B, arXiv 2006.09503; interleaved, arXiv 2104.04473).

Worked example: `llama-1b`, bf16, one GPU, 4,096 tokens, hidden 2,048, FFN 8,192, 32 heads in 8 groups of 64. In a block
a token keeps 2·(2,048·4 + 3,072 + 2,048 + 512 + 2,048 + 5·8,192) bytes and a little for norms and softmax: 114 kB; in
16 blocks 4,096 tokens keep 7.5 GB.

Multi-token heads keep what a block keeps and logits of their own. `not_counted` says what of a run is not known.

Not counted either: what the allocator cannot use, the CUDA context (about 0.5 GB), NCCL's buffers, workspaces of matrix
products. `tests/pretrain/test_memory.py` holds weights, gradients and optimizer against the real buffers, and the
activations, on a CPU, against what autograd saves; what a GPU's kernels keep is from their sources, not yet measured.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from parallel.kernels.head_chunks import WORKSPACE_BYTES, WORKSPACE_BYTES_CPU, chunk_rows
from parallel.layout import Layout
from pretrain.config import ModelConfig, OptimizerConfig
from pretrain.models.sizes import FAMILIES, attention_width, has_qk_norm, head_size, query_groups
from pretrain.models.standing_memory import standing
from pretrain.models.weights import weights

ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
BYTES_PER_INPUT = 8 + 8 + 8 + 8 + 1
"""Of a token: id, label, position, source, mask."""


class Batch(NamedTuple):
    """One data-parallel rank's part of a step."""

    seq_len: int
    micro_batch_size: int
    micro_batches: int


class Kernels(NamedTuple):
    """Which implementations run; they keep different tensors."""

    gpu: bool = True
    """Variable-length flash attention and fused RMSNorm; on a CPU attention keeps its output twice (each document's,
    and all together) and RMSNorm also x and x/rms in fp32."""
    fused_norms: bool = False
    """Blocks' norms and the last one keep a number or two for each token on a CPU too; those of queries and keys do as
    `gpu` says."""
    fused_gate: bool = False
    """SwiGLU and GeGLU: keeps neither silu(gate) nor the activation's factors."""
    fused_qk_norm_rope: bool = False
    """Keeps the fused projection's output, and of queries and keys only what attention multiplies."""
    fused_head: bool = False
    """Has the logits of a part of the tokens, and keeps the gradient of the last norm's output."""


GPU = Kernels()
ADAMW = OptimizerConfig()


class StageMemory(NamedTuple):
    """Bytes on each rank of one pipeline stage; ranks of a stage are alike."""

    stage: int
    parameters: int
    """Weights on the rank, in numbers."""
    weights: int
    gradients: int
    optimizer: int
    """Of the fullest rank; the others have less by padding, or by what others own."""
    activations: int
    logits: int
    recomputed: int
    inputs: int

    @property
    def total(self) -> int:
        """At the highest point: the end of a forward pass, or a recomputation after the logits are gone."""
        standing = self.weights + self.gradients + self.optimizer + self.inputs
        return standing + self.activations + max(self.logits, self.recomputed)


def not_counted(model: ModelConfig, layout: Layout) -> Iterator[str]:
    """What `memory_by_stage` does not know of a run, for people."""
    if model.num_experts is not None:
        yield "experts: which tokens go where is not known; activations are those of a dense MLP of ffn_hidden_size"
    if layout.fully_sharded:
        yield "fully sharded weights: what is gathered of a layer or two, and of embedding and head, is not counted"


def memory_by_stage(
    model: ModelConfig,
    vocab_size: int,
    layout: Layout,
    batch: Batch,
    precision: Literal["fp32", "bf16", "fp16"] = "bf16",
    recompute: Literal["none", "selective", "full"] = "none",
    kernels: Kernels = GPU,
    optimizer: OptimizerConfig = ADAMW,
) -> list[StageMemory]:
    """What each pipeline stage's ranks need in training; `vocab_size` is the padded one, `layout` one that fits."""
    return [
        _stage(stage, model, vocab_size, layout, batch, ITEMSIZE[precision], recompute, kernels, optimizer)
        for stage in range(layout.pipeline_parallel_size)
    ]


def _stage(
    stage: int,
    model: ModelConfig,
    vocab_size: int,
    layout: Layout,
    batch: Batch,
    itemsize: int,
    recompute: str,
    kernels: Kernels,
    optimizer: OptimizerConfig,
) -> StageMemory:
    chunks = [list(weights(model, vocab_size, layout, stage, chunk)) for chunk in range(layout.model_chunks)]
    stands = standing(chunks, layout, optimizer, itemsize, batch.micro_batches)
    block = _block(model, layout, itemsize, kernels)
    tokens = batch.seq_len * batch.micro_batch_size // layout.context_parallel_size
    kept, again = block.kept(recompute)
    layers = model.num_layers // (layout.pipeline_parallel_size * layout.model_chunks)
    activations = _in_flight(layout, stage, batch.micro_batches) * layers * kept
    logits = 0
    if stage == layout.pipeline_parallel_size - 1:
        heads = model.mtp.depth if model.mtp is not None else 0
        activations += heads * kept
        columns = vocab_size // layout.tensor_parallel_size
        # One copy in half precision: each head's lives while its logits are made.
        logits = tokens * ((1 + heads) * (block.final + 4 * columns) + (itemsize * columns if itemsize < 4 else 0))
        if kernels.fused_head:
            space = WORKSPACE_BYTES if kernels.gpu else WORKSPACE_BYTES_CPU
            rows = min(tokens, chunk_rows(tokens, columns, itemsize, space))
            of_heads = tokens * (1 + heads) * (block.final + model.hidden_size * itemsize)
            logits = rows * columns * itemsize + of_heads
    inputs = BYTES_PER_INPUT + head_size(model) * itemsize + _indices(layout)
    return StageMemory(
        stage=stage,
        parameters=sum(weight.numel for chunk in chunks for weight in chunk),
        weights=stands.weights,
        gradients=stands.gradients,
        optimizer=stands.optimizer,
        activations=tokens * activations,
        logits=logits,
        recomputed=tokens * again,
        inputs=tokens * inputs * batch.micro_batches,
    )


def _indices(layout: Layout) -> int:
    """Bytes a token of a rank needs under context parallelism to say where others' tokens go: of an all-gather the keys
    of both its pieces, of an all-to-all every token's place, there and back; int64."""
    cp = layout.context_parallel_size
    if cp == 1:
        return 0
    return 16 * cp if layout.context_parallel_method == "all_to_all" else 8 * cp + 4


# -- activations ------------------------------------------------------------------------------------------------------


class _Block(NamedTuple):
    """Bytes a token keeps in one block, by what is kept when."""

    input: int
    """The block's input: all that is left under `full`."""
    norms: int
    """Both norms without the block's input: the residual in the middle, and what projections take from the norms."""
    qkv: int
    """The fused projection's output, and what norms of queries and keys keep."""
    attention_input: int
    """Queries and keys as core attention gets them, where they are not views of `qkv`."""
    attention: int
    """Rotated queries and keys, softmax statistics, single documents' outputs."""
    attention_output: int
    mlp: int
    """Everything inside the MLP but its input."""
    final: int
    """The last norm's input and output."""
    shared: int
    """What a block that is made again has of the input that was kept: all of it, unless the norm took it to fp32."""

    def kept(self, recompute: str) -> tuple[int, int]:
        """(from forward to backward in every block, made again while one block's backward runs)."""
        whole = self.input + self.norms + self.qkv + self.attention + self.attention_output + self.mlp
        if recompute == "none":
            return whole, 0
        if recompute == "full":
            return self.input, whole - self.shared
        kept = self.input + self.norms + self.qkv + self.attention_input + self.attention_output
        return kept, max(self.mlp, self.attention)


def _block(model: ModelConfig, layout: Layout, itemsize: int, kernels: Kernels) -> _Block:
    family, tp = FAMILIES[model.family], layout.tensor_parallel_size
    width, key_value = attention_width(model) // tp, query_groups(model) * head_size(model) // tp
    heads, grouped = model.num_attention_heads // tp, query_groups(model) < model.num_attention_heads
    hidden = model.hidden_size // (tp if layout.sequence_parallel else 1)
    ffn = model.ffn_hidden_size // tp
    composite = family.normalization == "RMSNorm" and not kernels.gpu  # several operators, in fp32
    composite_blocks = composite and not kernels.fused_norms

    def norm(size: int, composite: bool = composite) -> int:
        """Besides a copy of its input in the weights' type, which the composite norm keeps in fp32 only."""
        if composite:
            return size * (4 if itemsize == 4 else 8 - itemsize)
        return 4 if family.normalization == "RMSNorm" else 8

    qkv = itemsize * (width + 2 * key_value)
    attention_input = itemsize * width if grouped else 0
    if has_qk_norm(model):
        if not composite:
            qkv += attention_input  # the copy that grouped queries are; else the norm keeps a view
            qkv += norm(0) * (heads + key_value // head_size(model))
        elif itemsize == 4:
            qkv += attention_input + norm(width + key_value)
        else:
            qkv += 8 * (width + key_value)
        attention_input = itemsize * (width + key_value)
    rotated = itemsize * (width + key_value)
    if kernels.fused_qk_norm_rope:
        statistics = (1 if family.normalization == "RMSNorm" else 2) if has_qk_norm(model) else 0
        qkv = itemsize * (width + 2 * key_value) + 4 * statistics * (heads + key_value // head_size(model))
        attention_input = rotated  # and not made again, but counted so
    if layout.context_parallel_method == "all_to_all":
        rotated += itemsize * (key_value + width)  # what is swapped: values, and the output of some heads
    elif layout.context_parallel_size > 1:
        rotated += itemsize * (2 * key_value * layout.context_parallel_size - key_value)
    if family.gated:
        mlp = itemsize * ffn * (3 if kernels.fused_gate else 5)
    else:
        mlp = itemsize * ffn * 2
    return _Block(
        input=itemsize * hidden,
        norms=3 * itemsize * hidden + 2 * norm(hidden, composite_blocks),
        qkv=qkv,
        attention_input=attention_input,
        attention=rotated + 4 * heads + (0 if kernels.gpu else itemsize * width),
        attention_output=itemsize * width,
        mlp=mlp,
        final=2 * itemsize * hidden + norm(hidden, composite_blocks),
        shared=0 if composite_blocks and itemsize == 2 else itemsize * hidden,
    )


def _in_flight(layout: Layout, stage: int, micro_batches: int) -> int:
    """Model chunks' forward passes of `stage` that await their backward, at most."""
    pipeline, chunks = layout.pipeline_parallel_size, layout.model_chunks
    if pipeline == 1:
        return 1
    if chunks == 1:
        return min(micro_batches, pipeline - stage)
    group = micro_batches if layout.pipeline_schedule == "breadth_first" else pipeline
    warm_up = 2 * (pipeline - stage - 1) + (chunks - 1) * group
    return min(micro_batches * chunks, warm_up + 1)
