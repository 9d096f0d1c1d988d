"""How big a model is and what a token costs: pure arithmetic on a `ModelConfig`.

Example: `llama`, 2 layers, hidden 64, 4 heads in 2 groups, FFN 128, vocabulary 256, untied: each block has
64·(64 + 2·32) + 64·64 attention weights, 3·64·128 MLP weights and two norms of 64; with two 256·64 embeddings and the
last norm that is 106,816 parameters.
"""

from typing import Literal, NamedTuple

from parallel.layout import BatchShape, Shape
from pretrain.config import ModelConfig, ParallelConfig, RunConfig
from pretrain.stages import StageSettings, batches_ahead, parallel_of, settings_of

Activation = Literal["silu", "gelu", "gelu_tanh"]


class Family(NamedTuple):
    """What a family of models has in common."""

    normalization: str
    """Name of the norm, in megatron-core's terms."""
    biases: bool
    """Biases in linear layers."""
    gated: bool
    """A gated MLP, SwiGLU unless the config says otherwise (arXiv 2002.05202), instead of GELU."""
    qk_norm: bool
    """Norm on queries and keys unless the config says otherwise."""


FAMILIES = {
    "wonton": Family("LayerNorm", biases=True, gated=False, qk_norm=True),
    "llama": Family("RMSNorm", biases=False, gated=True, qk_norm=False),
    "qwen3": Family("RMSNorm", biases=False, gated=True, qk_norm=True),
}


def activation(config: ModelConfig) -> Activation:
    """What the MLP applies to its gate, or to its inner numbers where there is none."""
    return config.activation or ("silu" if FAMILIES[config.family].gated else "gelu")


def has_qk_norm(config: ModelConfig) -> bool:
    """Whether queries and keys are normalised."""
    return FAMILIES[config.family].qk_norm if config.qk_norm is None else config.qk_norm


def query_groups(config: ModelConfig) -> int:
    """Key/value heads."""
    return config.num_query_groups or config.num_attention_heads


def head_size(config: ModelConfig) -> int:
    """Width of one head."""
    return config.head_size or config.hidden_size // config.num_attention_heads


def attention_width(config: ModelConfig) -> int:
    """Width of all query heads together; the hidden size unless heads have a size of their own."""
    return config.num_attention_heads * head_size(config)


def embedding_parameters(config: ModelConfig, vocab_size: int) -> int:
    """Parameters of the input embedding and, where it is another, the output head."""
    return vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)


def block_parameters(config: ModelConfig) -> int:
    """Parameters of one transformer block."""
    family, hidden, ffn = FAMILIES[config.family], config.hidden_size, config.ffn_hidden_size
    block = _matrix_parameters(config, config.num_experts or 0) + 2 * _norm_parameters(config, hidden)
    if family.biases:
        qkv = attention_width(config) + 2 * query_groups(config) * head_size(config)
        block += qkv + hidden + ffn * (2 if family.gated else 1) + hidden
    if has_qk_norm(config):
        block += 2 * _norm_parameters(config, head_size(config))
    return block


def expert_ffn_size(config: ModelConfig) -> int:
    """Inner width of each expert."""
    return config.moe_ffn_hidden_size or config.ffn_hidden_size


def count_parameters(config: ModelConfig, vocab_size: int) -> int:
    """Trainable parameters, embeddings included; `vocab_size` is the padded one."""
    blocks = _layers(config) * block_parameters(config)
    norms = (1 + _layers(config) - config.num_layers) * _norm_parameters(config, config.hidden_size)
    return blocks + norms + embedding_parameters(config, vocab_size)


def _layers(config: ModelConfig) -> int:
    """Transformer layers, those of multi-token heads included."""
    return config.num_layers + (config.mtp.depth if config.mtp is not None else 0)


def flops_per_token(config: ModelConfig, vocab_size: int, seq_len: int) -> tuple[int, int]:
    """Floating-point operations of forward and backward for one token: (full attention, causal attention).

    6 for every weight of a matrix product, the output head's included and the input embedding's not, plus the attention
    scores: 12·layers·heads·head_size·seq_len counted in full (PaLM, arXiv 2204.02311, appendix B), half of it when only
    the causal half is counted. Recomputation is not counted; multi-token heads are, and of the experts those that a
    token goes through.
    """
    layers = _layers(config)
    heads = 1 + layers - config.num_layers
    matrices = layers * _matrix_parameters(config, config.moe_top_k) + heads * vocab_size * config.hidden_size
    scores = 12 * layers * attention_width(config) * seq_len
    return 6 * matrices + scores, 6 * matrices + scores // 2


def layout_shape(config: RunConfig, vocab_size: int) -> Shape:
    """The numbers of a run that its layout has to divide, from its newest checkpoint on to where the layout changes."""
    return layout_shapes(config, vocab_size)[0][2]


def layout_shapes(config: RunConfig, vocab_size: int) -> list[tuple[int | None, ParallelConfig, Shape]]:
    """(stage it begins with, how the model is spread, numbers that this has to divide) of each stretch of a run with
    one layout, from its newest checkpoint on."""
    stretches: list[tuple[int | None, ParallelConfig, list[StageSettings]]] = []
    for turn in batches_ahead(config):
        parallel = parallel_of(config, turn.stage)
        if not stretches or stretches[-1][1] != parallel:
            stretches.append((turn.stage, parallel, []))
        stretches[-1][2].append(settings_of(config, turn.data))
    return [(stage, parallel, _shape(config, vocab_size, *batches)) for stage, parallel, batches in stretches]


def _shape(config: RunConfig, vocab_size: int, now: StageSettings, *later: StageSettings) -> Shape:
    model = config.model
    batches = [BatchShape(f"stages.{s.number}", s.seq_len, s.global_batch_size, s.micro_batch_size) for s in later]
    if config.train.eval_sequences:
        batches.append(BatchShape("held-out data", config.data.seq_len, None, config.train.micro_batch_size))
    return Shape(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=query_groups(model),
        head_size=model.head_size,
        ffn_hidden_size=model.ffn_hidden_size,
        vocab_size=vocab_size,
        seq_len=now.seq_len,
        global_batch_size=now.global_batch_size,
        micro_batch_size=now.micro_batch_size,
        lanes=config.data.lanes,
        later=tuple(batches),
        num_experts=model.num_experts,
        moe_shared_ffn_hidden_size=model.moe_shared_ffn_hidden_size,
    )


def _matrix_parameters(config: ModelConfig, experts: int) -> int:
    """Weights of one block's matrices, of so many of its `experts` where it has any."""
    hidden, heads = config.hidden_size, attention_width(config)
    attention = hidden * (heads + 2 * query_groups(config) * head_size(config)) + heads * hidden
    width = config.ffn_hidden_size
    if config.num_experts is not None:
        attention += hidden * config.num_experts  # the router
        width = experts * expert_ffn_size(config) + (config.moe_shared_ffn_hidden_size or 0)
    return attention + hidden * width * (3 if FAMILIES[config.family].gated else 2)


def _norm_parameters(config: ModelConfig, width: int) -> int:
    return width * (2 if FAMILIES[config.family].normalization == "LayerNorm" else 1)
