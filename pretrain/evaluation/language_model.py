"""A loaded model as lm-eval asks it: log-likelihoods of continuations, of whole texts, and greedy continuations.

Texts are encoded with the run's own encoder, so special tokens in a task's text are text; everything else follows
lm-eval's own model of transformers, whose results these equal for a model in fp32. (For others ours are the finer ones:
log-probabilities are taken in fp32 whatever the model's type.)
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from headrace.errors import ConfigError
from parallel import accelerator
from pretrain.convert.loaded import Loaded

Request = tuple[Any, list[int], list[int]]
"""What was asked (unused), context tokens (one at least), and continuation tokens (one at least)."""
DEFAULT_MAX_TOKENS = 256
"""Of a continuation, where the task says nothing; half the longest sequence where that is less."""
LIMIT_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks call it; lm-eval takes the first that is there."""


class LanguageModel(TemplateLM):
    """lm-eval's `LM` over a loaded model."""

    def __init__(self, loaded: Loaded, batch_size: int) -> None:
        super().__init__()
        self._loaded, self._batch_size = loaded, batch_size
        self._model = loaded.model.to(accelerator.device())
        self._max_length = int(loaded.model.config.max_position_embeddings)
        self.cut = 0
        """Requests whose beginning was left out because they were longer than the model's longest sequence."""

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self._loaded.encoder.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What a continuation without context follows: lm-eval's rule, so that figures compare."""
        bos_id = self._loaded.encoder.bos_id
        return self.eot_token_id if bos_id is None else bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; with the beginning-of-sequence token in front where the model was trained so."""
        ids: list[int] = self._loaded.encoder.encode(string).tolist()
        bos_id = self._loaded.encoder.bos_id
        wanted = self._loaded.starts_with_bos if add_special_tokens is None else add_special_tokens
        return [bos_id, *ids] if wanted and bos_id is not None else ids

    def _loglikelihood_tokens(self, requests: Sequence[Request], **kwargs: Any) -> list[tuple[float, bool]]:
        """Of each request the sum of its continuation's log-probabilities, and whether greedy choice writes it.

        Raises ConfigError for a continuation longer than the model's longest sequence.
        """
        # Choices of one token share their input; each input is computed once.
        wanted: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            assert context, "a context has one token at least"
            assert continuation, "a continuation has one token at least"
            if len(continuation) > self._max_length:
                raise ConfigError(
                    f"an answer of {len(continuation)} tokens is longer than the model's longest sequence, "
                    f"{self._max_length}; this task cannot be asked of this model"
                )
            self.cut += len(context) + len(continuation) > self._max_length + 1
            tokens = (context + continuation)[-(self._max_length + 1) : -1]
            wanted.setdefault(tuple(tokens), []).append(number)
        # By length, the longest first: little padding, and what does not fit into memory fails at once. Then by tokens,
        # so that batches, and with them roundings, do not depend on the order of requests.
        inputs = sorted(wanted, key=lambda tokens: (-len(tokens), tokens))
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for begin in tqdm(range(0, len(inputs), self._batch_size), "batches", disable=None):
            batch = inputs[begin : begin + self._batch_size]
            logits = self._logits(batch)
            for row, tokens in enumerate(batch):
                for number in wanted[tokens]:
                    continuation = torch.tensor(requests[number][2])
                    answers[number] = _score(logits[row, : len(tokens)], continuation.to(logits.device))
        return answers

    @torch.no_grad()
    def _logits(self, batch: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """float[rows, longest, vocabulary]; rows are padded on the right, which no token before sees."""
        ids = torch.full((len(batch), len(batch[0])), self.eot_token_id)
        for row, tokens in enumerate(batch):
            ids[row, : len(tokens)] = torch.tensor(tokens)
        logits: torch.Tensor = self._model(ids.to(self._model.device)).logits
        return logits

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, every token once, in windows of the longest sequence."""
        windows: list[Request] = []
        ends = []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            pairs = get_rolling_token_windows(tokens, self.prefix_token_id, self._max_length, context_len=1)
            windows += [(None, *make_disjoint_window(pair)) for pair in pairs]
            ends.append(len(windows))
        scores = [score for score, _ in self._loglikelihood_tokens(windows)]
        return [sum(scores[begin:end]) for begin, end in zip([0, *ends], ends, strict=False)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The greedy continuation of each text, up to a stop string, the end of the document, or the task's limit.

        Raises ConfigError for a task that wants tokens drawn at random, or continuations that leave no room for the
        text before them.
        """
        limits = [self._limit(request.args[1]) for request in requests]  # told before the first is written
        asked = zip(requests, limits, strict=True)
        return [
            self._write(*request.args, limit)
            for request, limit in tqdm(asked, "continuations", len(limits), disable=None)
        ]

    def _limit(self, options: dict[str, Any]) -> int:
        """Tokens that a continuation may have; the rest of the longest sequence is the context's."""
        given = next((options[name] for name in LIMIT_NAMES if options.get(name) is not None), None)
        most = max(1, min(DEFAULT_MAX_TOKENS, self._max_length // 2)) if given is None else int(given)
        if most >= self._max_length:
            raise ConfigError(
                f"continuations of up to {most} tokens leave no room for what comes before them in the model's longest "
                f"sequence, {self._max_length}; this task cannot be asked of this model"
            )
        return most

    @torch.no_grad()
    def _write(self, context: str, options: dict[str, Any], most: int) -> str:
        import transformers

        if options.get("do_sample") and options.get("temperature", 1.0) != 0.0:
            raise ConfigError("this task draws tokens at random (do_sample); only greedy continuations are supported")
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        ids = self.tok_encode(context) or [self.prefix_token_id]
        room = self._max_length - most
        self.cut += len(ids) > room
        ids = ids[-room:]
        begun = torch.tensor([ids], device=self._model.device)
        config = transformers.GenerationConfig(
            max_new_tokens=most, do_sample=False, eos_token_id=self.eot_token_id, pad_token_id=self.eot_token_id
        )
        self._model.generation_config = transformers.GenerationConfig()  # the folder's own defaults must not mix in

        def is_over(tokens: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            text = self._text(tokens[0, len(ids) :].tolist())
            return torch.tensor([any(stop in text for stop in stops)], device=tokens.device)

        criteria = transformers.StoppingCriteriaList([is_over] if stops else [])
        mask = torch.ones_like(begun)
        written = self._model.generate(begun, attention_mask=mask, generation_config=config, stopping_criteria=criteria)
        return _before_any(self._text(written[0, len(ids) :].tolist()), stops)

    def _text(self, ids: Iterable[int]) -> str:
        return self._loaded.encoder.decode([token for token in ids if token != self.eot_token_id])


def _score(logits: torch.Tensor, continuation: torch.Tensor) -> tuple[float, bool]:
    """Of `logits` float[tokens, vocabulary] the last ones predict `continuation` int64[n]."""
    own = torch.log_softmax(logits[-len(continuation) :].float(), dim=-1)
    score = own.gather(1, continuation[:, None]).sum()
    return float(score), bool((own.argmax(dim=-1) == continuation).all())


def _before_any(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0] if stop else text
    return text
