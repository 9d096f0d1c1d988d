"""Published model sizes, by name. Recipes start from these.

The Nyonic report (arXiv 2404.15702) gives the largest wonton in full; for the two smaller ones it gives the size
only, so they follow GPT-3's proportions (arXiv 2005.14165, table 2.1) with heads of 128. The llamas are Llama 3's
(arXiv 2407.21783) shapes.
"""

from pretrain.config import ModelConfig

WONTON_VOCAB = 139_776
LLAMA_VOCAB = 128_256


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


PRESETS = {
    "wonton-1.5b": _wonton(24, 2048, tied=True),
    "wonton-2.7b": _wonton(30, 2560, tied=True),
    "wonton-6.7b": _wonton(32, 4096, tied=True),
    "llama-1b": _llama(16, 2048, 32, 8192, tied=True),
    "llama-3b": _llama(28, 3072, 24, 8192, tied=True),
    "llama-8b": _llama(32, 4096, 32, 14336, tied=False),
}
"""Model configurations by name; all hold a context of 2048 tokens and more."""
