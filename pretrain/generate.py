"""Text from a trained model: prompts in, tokens out one by one, each attended to once (KV cache)."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch

from data_scheduler.encoder import Encoder
from headrace.errors import ConfigError
from pretrain.convert.loaded import Loaded


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Raises ConfigError for values that mean nothing."""

    temperature: float = 1.0
    """Logits are divided by it; 0: the likeliest token, always (greedy)."""
    top_k: int = 0
    """Choose among so many of the likeliest tokens; 0: among all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together have this probability (arXiv 1904.09751)."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(f"--temperature {self.temperature}: must be 0 (greedy) or more")
        if self.top_k < 0:
            raise ConfigError(f"--top-k {self.top_k}: must be 0 (all tokens) or more")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"--top-p {self.top_p}: must be above 0 and at most 1")
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"--seed {self.seed}: must be from 0 to {2**64 - 1}, 64 bits")


def generate(
    loaded: Loaded,
    prompt: str,
    max_tokens: int,
    sampling: Sampling,
    write: Callable[[str], None] = lambda text: None,
    cache: bool = True,
) -> str:
    """The continuation of `prompt`, up to the end of the document or `max_tokens`; `write` gets it as it comes.

    The same arguments give the same text. `cache` off computes everything anew for each token, to compare.
    """
    import transformers

    ids = loaded.prompt(prompt)
    streamer = _Streamer(loaded.encoder, write)
    greedy = sampling.temperature == 0.0
    chosen: dict[str, Any] = {"do_sample": False}
    if not greedy:
        chosen = {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k}
        chosen["top_p"] = sampling.top_p
    config = transformers.GenerationConfig(
        max_new_tokens=max_tokens,
        eos_token_id=loaded.encoder.eos_id,
        pad_token_id=loaded.encoder.eos_id,
        use_cache=cache,
        **chosen,
    )
    loaded.model.generation_config = transformers.GenerationConfig()  # the folder's own defaults must not mix in
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sampling.seed)
        loaded.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=streamer)
    return streamer.text


class _Streamer:
    """Turns tokens into text as they come; a character of several tokens is written when it is whole."""

    def __init__(self, encoder: Encoder, write: Callable[[str], None]) -> None:
        self._encoder, self._write = encoder, write
        self._ids: list[int] = []
        self._is_prompt = True
        self.text = ""

    def put(self, tokens: torch.Tensor) -> None:
        """transformers calls this with the prompt first, then with every token."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self._ids += [token for token in tokens.flatten().tolist() if token != self._encoder.eos_id]
        # Byte-fallback decoders show each byte of an unfinished character as one U+FFFD.
        text = self._encoder.decode(self._ids).rstrip("\ufffd")
        # Decoders that join words may change what they said of the last token: only what stands is written.
        if text.startswith(self.text):
            self._show(text, len(self.text))

    def end(self) -> None:
        """transformers calls this after the last token."""
        text = self._encoder.decode(self._ids)
        same = takewhile(lambda pair: pair[0] == pair[1], zip(text, self.text, strict=False))
        self._show(text, len(list(same)))

    def _show(self, text: str, since: int) -> None:
        if since < len(text):
            self._write(text[since:])
        self.text = text
