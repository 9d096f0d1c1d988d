"""Published model sizes, by name. Recipes start from these: `model: {preset: llama-1b}`.

The Nyonic report (arXiv 2404.15702) gives the largest wonton in full: 32 layers of 4,096, FFN 16,384, 32 heads, a
vocabulary of 139,776. It calls it 7B and counts 6.7 B parameters. For the two smaller ones it gives the size only, so
they follow GPT-3's proportions (arXiv 2005.14165, table 2.1) with heads of 128. The names leave open whether the large
vocabulary counts; in billions of parameters:

    name   layers x hidden   total, tied   without embedding   total, untied
    1.5b   24 x 2048         1.49          1.21                1.78
    2.7b   30 x 2560         2.72          2.36                3.07
    6.7b   32 x 4096         7.02          6.44                7.59

With tied embeddings the totals are 0.3 %, 0.7 % and 4.7 % off the names, together nearer than by any other reading, so
wontons tie them; 7.02 B is also what the report's "7B" says. (6.7 B is what GPT-3's shape of this size has with
GPT-3's own vocabulary of 50,257.)

The llamas are Llama 3's (arXiv 2407.21783) and 3.2's shapes, the qwen3 those of Qwen3 (arXiv 2505.09388, table 1),
whose heads are 128 wide whatever the hidden size is.
"""

from pretrain.config import ModelConfig

WONTON_VOCAB = 139_776
LLAMA_VOCAB = 128_256
QWEN3_VOCAB = 151_936


def _wonton(num_layers: int, hidden_size: int, tied: bool) -> ModelConfig:
    return ModelConfig(
        family="wonton",
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=hidden_size // 128,
        ffn_hidden_size=4 * hidden_size,
        vocab_size=WONTON_VOCAB,
        tie_embeddings=tied,
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
    "wonton-1.5b": _wonton(24, 2048, tied=True),
    "wonton-2.7b": _wonton(30, 2560, tied=True),
    "wonton-6.7b": _wonton(32, 4096, tied=True),
    "llama-1b": _llama(16, 2048, 32, 8192, tied=True),
    "llama-3b": _llama(28, 3072, 24, 8192, tied=True),
    "llama-8b": _llama(32, 4096, 32, 14336, tied=False),
    "qwen3-0.6b": _qwen3(28, 1024, 16, 3072, tied=True),
    "qwen3-1.7b": _qwen3(28, 2048, 16, 6144, tied=True),
    "qwen3-4b": _qwen3(36, 2560, 32, 9728, tied=True),
    "qwen3-8b": _qwen3(36, 4096, 32, 12288, tied=False),
}
"""Model configurations by name; all hold a context of 2048 tokens and more."""
