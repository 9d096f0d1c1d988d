"""All transforms of one source, applied to its documents."""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from data_scheduler.config import SourceConfig
from data_scheduler.encoder import Encoder, Tokens
from data_scheduler.formats.records import Document, MarkedText, MarkedTokens, Versions
from data_scheduler.objectives.config import Objective, find_problem, moves_loss
from data_scheduler.objectives.config import needs_text as objectives_need_text
from data_scheduler.objectives.draw import Fim, Objectives
from data_scheduler.order import draws
from data_scheduler.paths import file_kind
from data_scheduler.transforms.bpe_dropout import DropoutEncoder
from data_scheduler.transforms.chance import is_drawn
from data_scheduler.transforms.config import (
    TOKEN_FORMATS,
    BpeDropoutTransform,
    FimTransform,
    PrefixTransform,
    TemplatesTransform,
    needs_text,
    text_is_needed,
)
from data_scheduler.transforms.fim import DRAWS, Parts, contexts, find_sentinels, rearrange, special_id
from headrace.errors import ConfigError


def open_transforms(
    config: SourceConfig, paths: Iterable[str], encoder: Encoder, seed: int, objectives: Sequence[Objective] = ()
) -> "SourceTransforms | None":
    """The transforms of a source with files `paths`, its objectives among them; None where it has none and is causal.

    Raises ConfigError when they cannot be.
    """
    if not config.transforms and all(one.kind == "causal" for one in objectives):
        return None
    problem = find_problem(objectives, config)
    if problem is not None:
        raise ConfigError(f"source {config.name!r}: {problem}")
    check_text(config, paths, objectives)
    return SourceTransforms(config, encoder, seed, objectives)


def check_text(config: SourceConfig, paths: Iterable[str], objectives: Sequence[Objective] = ()) -> None:
    """Raise ConfigError when transforms or objectives need text and one of the source's files holds token ids."""
    if objectives_need_text(objectives):
        tokens = next((path for path in paths if file_kind(path, config.format)[0] in TOKEN_FORMATS), None)
        if tokens is not None:
            raise ConfigError(
                f"source {config.name!r}: objectives: fim works on text, but {tokens} holds token ids; give the raw "
                "text, or the source `objectives` without fim"
            )
    if needs_text(config.transforms):
        tokens = next((path for path in paths if file_kind(path, config.format)[0] in TOKEN_FORMATS), None)
        if tokens is not None:
            raise ConfigError(f"source {config.name!r}: {text_is_needed(config.transforms, tokens)}")


class SourceTransforms:
    """Makes tokens of documents. What a document becomes depends on its id, the epoch and the seed, on nothing else."""

    def __init__(self, config: SourceConfig, encoder: Encoder, seed: int, objectives: Sequence[Objective] = ()) -> None:
        """Raises ConfigError for tokens that the tokenizer lacks, or a tokenizer that bpe_dropout cannot use."""
        self._name, self._seed, self._encoder = config.name, seed, encoder
        self._templates: list[float] = []
        """Where each template's share of [0, 1) ends."""
        self._fim: Fim | None = None
        self._objectives = Objectives(objectives, encoder, config.name) if objectives else None
        self._prefixes: list[tuple[PrefixTransform, Tokens]] = []
        self._p = 0.0
        for transform in config.transforms:
            if isinstance(transform, TemplatesTransform):
                ends = list(itertools.accumulate(template.weight for template in transform.templates))
                self._templates = [end / ends[-1] for end in ends]
            elif isinstance(transform, FimTransform):
                self._fim = Fim(transform, find_sentinels(transform, encoder, config.name))
            elif isinstance(transform, BpeDropoutTransform):
                self._p = transform.p
                try:
                    self._dropout = DropoutEncoder(encoder)
                except ConfigError as error:
                    raise ConfigError(f"source {config.name!r}: {error}") from None
            else:
                ids = [special_id(name, encoder, config.name, "prefix") for name in transform.tokens]
                self._prefixes.append((transform, np.array(ids, np.uint32)))
        # All documents of a source are marked or none: a sequence's hash says whether its tokens have weights, and must
        # not depend on which documents happened to be encoded together.
        prompts = any(
            template.prompt
            for one in config.transforms
            if isinstance(one, TemplatesTransform)
            for template in one.templates
        )
        quiet = any(not prefix.learned for prefix, _ in self._prefixes)
        marked = bool(quiet or prompts or config.prompt or config.masked_key or config.loss_weight_key)
        self._marks = marked or moves_loss(objectives)

    def apply(
        self, documents: Sequence[Document | MarkedTokens], ids: Sequence[int], epoch: int
    ) -> list[Document | MarkedTokens]:
        """The documents of an epoch, `ids` being their document ids, as tokens without boundary tokens."""
        return [self._apply(document, number, epoch) for document, number in zip(documents, ids, strict=True)]

    def _apply(self, document: Document | MarkedTokens, number: int, epoch: int) -> Document | MarkedTokens:
        key = (self._seed, "transform", self._name, epoch, number)
        prefixes: Sequence[str] = ()
        if isinstance(document, Versions):
            prefixes = document.prefixes
            document = document.choose(self._template(*key))
        objective = None
        if self._objectives is not None:
            objective = self._objectives.draw(self._seed, "objective", self._name, epoch, number)
        fim = objective if isinstance(objective, Fim) else self._fim
        weight = document.weight if isinstance(document, MarkedText | MarkedTokens) else 1.0
        pieces: list[tuple[Tokens, bool]] = []
        for place, (prefix, tokens) in enumerate(self._prefixes):
            if is_drawn(draws(1, *key, "prefix", place)[0], prefix.rate):
                text = prefixes[place] if prefixes else prefix.text or ""
                own = self._encode(text, *key, "prefix text", place) if text else tokens[:0]
                pieces.append((np.concatenate([tokens, own]), prefix.learned))
        control = len(pieces)
        if isinstance(document, str):
            pieces.append((self._text(document, fim, key), True))
        elif isinstance(document, MarkedText):
            for place, (text, learned) in enumerate(document.pieces):
                pieces.append((self._text(text, fim, key, place), learned))
        elif isinstance(document, MarkedTokens):
            pieces += [(np.asarray(tokens, np.uint32), learned) for tokens, learned in document.pieces]
        else:
            pieces.append((np.asarray(document, np.uint32), True))
        prefix_length = 0
        if objective is not None and not isinstance(objective, Fim):
            own = np.concatenate([np.empty(0, np.uint32), *(tokens for tokens, _ in pieces[control:])])
            made, prefix_length = objective.apply(own, draws(len(own), *key, "objective"))
            if prefix_length:  # what is seen ahead of time is not learned
                pieces = [(tokens, False) for tokens, _ in pieces[:control]]
                prefix_length += sum(len(tokens) for tokens, _ in pieces)
            pieces = [*pieces[:control], *made]
        if self._marks:
            return MarkedTokens(tuple(pieces), weight, prefix_length)
        return np.concatenate([tokens for tokens, _ in pieces])

    def _template(self, *key: int | str) -> int:
        """The template of a document."""
        if len(self._templates) < 2:
            return 0
        draw = draws(1, *key, "templates")[0]
        return next(place for place, end in enumerate(self._templates) if is_drawn(draw, end))

    def _text(self, text: str, fim: Fim | None, key: tuple[int | str, ...], place: int = 0) -> Tokens:
        """A piece of a document's text as tokens."""
        if fim is None:
            return self._encode(text, *key, "bpe_dropout", place)
        pieces = contexts(text, fim.config.context_characters)
        numbers = draws(DRAWS * len(pieces), *key, "fim")
        parts: Parts = []
        for at, piece in enumerate(pieces):
            made = rearrange(piece, fim.config, fim.sentinels, numbers[DRAWS * at : DRAWS * (at + 1)])
            # What follows a middle is no part of it. The last one's end is the document's.
            parts += made if made == [piece] or at + 1 == len(pieces) else [*made, self._encoder.eos_id]
        encoded = [
            np.array([part], np.uint32)
            if isinstance(part, int)
            else self._encode(part, *key, "bpe_dropout", place, number)
            for number, part in enumerate(parts)
        ]
        return np.concatenate([np.empty(0, np.uint32), *encoded])

    def _encode(self, text: str, *key: int | str) -> Tokens:
        return self._dropout.encode(text, self._p, *key) if self._p else self._encoder.encode(text)
