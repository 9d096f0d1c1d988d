"""What all arms train: one model, one optimizer, sequences made from a seed."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Settings(NamedTuple):
    """A llama and its batches; the same in all arms."""

    layers: int = 6
    hidden: int = 384
    heads: int = 6
    groups: int = 2
    ffn: int = 1024
    vocab: int = 8192
    seq_len: int = 512
    sequences: int = 4
    """Per step, over all processes."""
    mean_document: int = 200
    """Tokens; packed sequences are cut from documents of exponentially distributed length."""
    lr: float = 1e-3
    weight_decay: float = 0.1
    clip: float = 1.0
    eps: float = 1e-5
    rope_base: float = 10000.0
    seed: int = 0

    @property
    def tokens_per_step(self) -> int:
        return self.sequences * self.seq_len

    def batch(self, step: int) -> tuple[npt.NDArray[np.int64], list[npt.NDArray[np.int32]]]:
        """(tokens int64[sequences, seq_len + 1], where documents start in each): the batch of `step`."""
        random = np.random.default_rng((self.seed, step))
        # Words of a Zipf-like distribution, so that there is something to learn from the first step on.
        tokens = (self.vocab * random.random((self.sequences, self.seq_len + 1)) ** 4).astype(np.int64)
        starts = []
        for _ in range(self.sequences):
            lengths = 2 + random.exponential(self.mean_document, 4 * self.seq_len // self.mean_document + 8)
            ends = np.cumsum(lengths).astype(np.int32)
            starts.append(np.concatenate(([0], ends[ends < self.seq_len])).astype(np.int32))
        return tokens, starts


QUICK = Settings(layers=2, hidden=64, heads=4, groups=2, ffn=128, vocab=256, seq_len=64, sequences=2, mean_document=24)
