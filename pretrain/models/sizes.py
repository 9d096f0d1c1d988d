"""How big a model is and what a token costs: pure arithmetic on a `ModelConfig`.

Example: `llama`, 2 layers, hidden 64, 4 heads in 2 groups, FFN 128, vocabulary 256, untied: each block has
64·(64 + 2·32) + 64·64 attention weights, 3·64·128 MLP weights and two norms of 64; with two 256·64 embeddings and the
last norm that is 106,816 parameters.
"""

from typing import NamedTuple

from parallel.layout import BatchShape, Shape
from pretrain.config import ModelConfig, RunConfig
from pretrain.stages import batches_ahead, settings_of


class Family(NamedTuple):
    """What a family of models has in common."""

    normalization: str
    """Name of the norm, in megatron-core's terms."""
    biases: bool
    """Biases in linear layers."""
    gated: bool
    """SwiGLU (arXiv 2002.05202) instead of GELU."""
    qk_norm: bool
    """Norm on queries and keys unless the config says otherwise."""


FAMILIES = {
    "wonton": Family("LayerNorm", biases=True, gated=False, qk_norm=True),
    "llama": Family("RMSNorm", biases=False, gated=True, qk_norm=False),
    "qwen3": Family("RMSNorm", biases=False, gated=True, qk_norm=True),
}


def has_qk_norm(config: ModelConfig) -> bool:
    """Whether queries and keys are normalised."""
    return FAMILIES[config.family].qk_norm if config.qk_norm is None else config.qk_norm


def query_groups(config: ModelConfig) -> int:
    """Key/value heads."""
    return config.num_query_groups or config.num_attention_heads


def head_size(config: ModelConfig) -> int:
    """Width of one head."""
    return config.hidden_size // config.num_attention_heads


def expert_ffn_size(config: ModelConfig) -> int:
    """Inner width of each expert."""
    return config.moe_ffn_hidden_size or config.ffn_hidden_size


def count_parameters(config: ModelConfig, vocab_size: int) -> int:
    """Trainable parameters, embeddings included; `vocab_size` is the padded one."""
    family, hidden, ffn = FAMILIES[config.family], config.hidden_size, config.ffn_hidden_size
    norm = hidden * (2 if family.normalization == "LayerNorm" else 1)
    embeddings = vocab_size * hidden * (1 if config.tie_embeddings else 2)
    block = _matrix_parameters(config, config.num_experts or 0) + 2 * norm
    if family.biases:
        key_value = 2 * query_groups(config) * head_size(config)
        block += hidden + key_value + hidden + ffn * (2 if family.gated else 1) + hidden
    if has_qk_norm(config):
        block += 2 * head_size(config) * (2 if family.normalization == "LayerNorm" else 1)
    return config.num_layers * block + norm + embeddings


def flops_per_token(config: ModelConfig, vocab_size: int, seq_len: int) -> tuple[int, int]:
    """Floating-point operations of forward and backward for one token: (full attention, causal attention).

    6 for every weight of a matrix product, the output head's included and the input embedding's not, plus the attention
    scores: 12·layers·hidden·seq_len counted in full (PaLM, arXiv 2204.02311, appendix B), half of it when only the
    causal half is counted. Recomputation is not counted, and of the experts only those that a token goes through.
    """
    matrices = config.num_layers * _matrix_parameters(config, config.moe_top_k) + vocab_size * config.hidden_size
    scores = 12 * config.num_layers * config.hidden_size * seq_len
    return 6 * matrices + scores, 6 * matrices + scores // 2


def layout_shape(config: RunConfig, vocab_size: int) -> Shape:
    """The numbers of a run that its layout has to divide, from its newest checkpoint on."""
    model = config.model
    now, *later = (settings_of(config, turn.data) for turn in batches_ahead(config))
    batches = [BatchShape(f"stages.{s.number}", s.seq_len, s.global_batch_size, s.micro_batch_size) for s in later]
    if config.train.eval_sequences:
        batches.append(BatchShape("held-out data", config.data.seq_len, None, config.train.micro_batch_size))
    return Shape(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=query_groups(model),
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
    hidden = config.hidden_size
    attention = hidden * (hidden + 2 * query_groups(config) * head_size(config)) + hidden * hidden
    width = config.ffn_hidden_size
    if config.num_experts is not None:
        attention += hidden * config.num_experts  # the router
        width = experts * expert_ffn_size(config) + (config.moe_shared_ffn_hidden_size or 0)
    return attention + hidden * width * (3 if FAMILIES[config.family].gated else 2)
