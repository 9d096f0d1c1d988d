"""Published model sizes, by name. Recipes start from these: `model: {preset: llama-1b}`.

The wontons are those of Nyonic's public configurations (github.com/nyonicai/nyonic-public, confs/wonton-*.yaml; the
largest is the report's too, arXiv 2404.15702), whose model has an output layer of its own. The names leave open what
counts; in billions of parameters:

    name   layers x hidden, heads   vocabulary   total   without embedding
    1.5b   48 x 1600, 25                50,304    1.64   1.48
    2.7b   32 x 2560, 20               139,776    3.23   2.52
    6.7b   32 x 4096, 32               139,776    7.59   6.44

Three things differ from the public files: positions of the smallest are learned there, here they are rotary, as in the
others; the output layer's bias is left out; queries and keys are normalised as the report has it (`qk_norm: false` is
what confs/wonton-6.7B.yaml says).

The llamas are Llama 3's (arXiv 2407.21783) and 3.2's shapes, the qwen3 those of Qwen3 (arXiv 2505.09388, table 1),
whose heads are 128 wide whatever the hidden size is.
"""

from pretrain.config import ModelConfig

WONTON_VOCAB = 139_776
WONTON_V0_VOCAB = 50_304
LLAMA_VOCAB = 128_256
QWEN3_VOCAB = 151_936


def _wonton(num_layers: int, hidden_size: int, heads: int, vocab_size: int) -> ModelConfig:
    return ModelConfig(
        family="wonton",
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=heads,
        ffn_hidden_size=4 * hidden_size,
        vocab_size=vocab_size,
        tie_embeddings=False,
        max_z_loss=2e-4,
    )


def _llama(num_layers: int, hidden_size: int, heads: int, ffn_hidden_size: int, tied: bool) -> ModelConfig:
    return ModelConfig(
        family="llama",
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=heads,
        num_query_groups=8,
        ffn_hidden_size=ffn_hidden_size,
        vocab_size=LLAMA_VOCAB,
        rope_base=500_000.0,
        tie_embeddings=tied,
    )


def _qwen3(num_layers: int, hidden_size: int, heads: int, ffn_hidden_size: int, tied: bool) -> ModelConfig:
    return ModelConfig(
        family="qwen3",
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=heads,
        num_query_groups=8,
        head_size=128,
        ffn_hidden_size=ffn_hidden_size,
        vocab_size=QWEN3_VOCAB,
        rope_base=1_000_000.0,
        norm_eps=1e-6,
        tie_embeddings=tied,
    )


PRESETS = {
    "wonton-1.5b": _wonton(48, 1600, 25, WONTON_V0_VOCAB),
    "wonton-2.7b": _wonton(32, 2560, 20, WONTON_VOCAB),
    "wonton-6.7b": _wonton(32, 4096, 32, WONTON_VOCAB),
    "llama-1b": _llama(16, 2048, 32, 8192, tied=True),
    "llama-3b": _llama(28, 3072, 24, 8192, tied=True),
    "llama-8b": _llama(32, 4096, 32, 14336, tied=False),
    "qwen3-0.6b": _qwen3(28, 1024, 16, 3072, tied=True),
    "qwen3-1.7b": _qwen3(28, 2048, 16, 6144, tied=True),
    "qwen3-4b": _qwen3(36, 2560, 32, 9728, tied=True),
    "qwen3-8b": _qwen3(36, 4096, 32, 12288, tied=False),
}
"""Model configurations by name; all hold a context of 2048 tokens and more."""
