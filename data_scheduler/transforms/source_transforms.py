"""All transforms of one source, applied to its documents."""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from data_scheduler.config import SourceConfig
from data_scheduler.encoder import Encoder, Tokens
from data_scheduler.formats.records import Document, MarkedText, MarkedTokens, Versions
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
    config: SourceConfig, paths: Iterable[str], encoder: Encoder, seed: int
) -> "SourceTransforms | None":
    """The transforms of a source with files `paths`; None where it has none. Raises ConfigError when they cannot be."""
    if not config.transforms:
        return None
    check_text(config, paths)
    return SourceTransforms(config, encoder, seed)


def check_text(config: SourceConfig, paths: Iterable[str]) -> None:
    """Raise ConfigError when the source's transforms need text and one of its files holds token ids."""
    if needs_text(config.transforms):
        tokens = next((path for path in paths if file_kind(path, config.format)[0] in TOKEN_FORMATS), None)
        if tokens is not None:
            raise ConfigError(f"source {config.name!r}: {text_is_needed(config.transforms, tokens)}")


class SourceTransforms:
    """Makes tokens of documents. What a document becomes depends on its id, the epoch and the seed, on nothing else."""

    def __init__(self, config: SourceConfig, encoder: Encoder, seed: int) -> None:
        """Raises ConfigError for tokens that the tokenizer lacks, or a tokenizer that bpe_dropout cannot use."""
        self._name, self._seed, self._encoder = config.name, seed, encoder
        self._templates: list[float] = []
        """Where each template's share of [0, 1) ends."""
        self._fim: FimTransform | None = None
        self._prefixes: list[tuple[PrefixTransform, Tokens]] = []
        self._p = 0.0
        for transform in config.transforms:
            if isinstance(transform, TemplatesTransform):
                ends = list(itertools.accumulate(template.weight for template in transform.templates))
                self._templates = [end / ends[-1] for end in ends]
            elif isinstance(transform, FimTransform):
                self._fim = transform
                self._sentinels = find_sentinels(transform, encoder, config.name)
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
        self._marks = bool(quiet or prompts or config.prompt or config.masked_key or config.loss_weight_key)

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
        weight = document.weight if isinstance(document, MarkedText | MarkedTokens) else 1.0
        pieces: list[tuple[Tokens, bool]] = []
        for place, (prefix, tokens) in enumerate(self._prefixes):
            if is_drawn(draws(1, *key, "prefix", place)[0], prefix.rate):
                text = prefixes[place] if prefixes else prefix.text or ""
                own = self._encode(text, *key, "prefix text", place) if text else tokens[:0]
                pieces.append((np.concatenate([tokens, own]), prefix.learned))
        if isinstance(document, str):
            pieces.append((self._text(document, key), True))
        elif isinstance(document, MarkedText):
            for place, (text, learned) in enumerate(document.pieces):
                pieces.append((self._text(text, key, place), learned))
        elif isinstance(document, MarkedTokens):
            pieces += [(np.asarray(tokens, np.uint32), learned) for tokens, learned in document.pieces]
        else:
            pieces.append((np.asarray(document, np.uint32), True))
        if self._marks:
            return MarkedTokens(tuple(pieces), weight)
        return np.concatenate([tokens for tokens, _ in pieces])

    def _template(self, *key: int | str) -> int:
        """The template of a document."""
        if len(self._templates) < 2:
            return 0
        draw = draws(1, *key, "templates")[0]
        return next(place for place, end in enumerate(self._templates) if is_drawn(draw, end))

    def _text(self, text: str, key: tuple[int | str, ...], place: int = 0) -> Tokens:
        """A piece of a document's text as tokens."""
        if self._fim is None:
            return self._encode(text, *key, "bpe_dropout", place)
        pieces = contexts(text, self._fim.context_characters)
        numbers = draws(DRAWS * len(pieces), *key, "fim")
        parts: Parts = []
        for at, piece in enumerate(pieces):
            made = rearrange(piece, self._fim, self._sentinels, numbers[DRAWS * at : DRAWS * (at + 1)])
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
