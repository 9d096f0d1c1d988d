"""Text to token ids: the tokenizer's own library as the reference, and a fast encoder that must agree with it exactly.

    encoder = load_encoder("tokenizer.json")            # or a folder that holds one, or a SentencePiece .model
    tokens, offsets = encoder.encode_batch([b"one document", "another"])
    tokens[offsets[1] : offsets[2]]                     # the second document's ids; no special tokens are added

Three rules hold for every encoder here:

- **No boundary can be forged.** Text that contains `<|endoftext|>` (or any other special token) literally is encoded
  as ordinary text. Library defaults turn it into the boundary token; 1 document in 2,555 of a code corpus has it.
- **Any input has one meaning.** Text is UTF-8. Each undecodable byte sequence in `bytes` and each lone surrogate in
  `str` (which no UTF-8 can hold) becomes U+FFFD before encoding, the same in every encoder.
- **Fast means identical.** `gigatoken` encodes 100 to 260 MB per CPU-second where `tokenizers` does 1 to 3 (46 to 110
  for tokenizers with space-run tokens, such as ours), and returns arrays. It is used only when it agrees token for
  token with the reference on the texts of `encoder_check.py` and on the caller's samples; otherwise the reference is
  used and one warning says why.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from data_scheduler.encoder_check import check_texts, first_difference
from headrace.errors import ConfigError

log = logging.getLogger("headrace.data")

Text = bytes | str
Tokens = npt.NDArray[np.uint32]
Offsets = npt.NDArray[np.int64]

REMADE_BYTES = 64 << 30
"""Bytes of text after which gigatoken's tokenizer is made anew. The words it has met grow with the 0.5th to 0.65th
power of the text, to one or two gigabytes then; at 1 µs a word, meeting them again costs 1 to 2 % of encoding all."""

EOS_NAMES = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")
BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>")
_SURROGATE = re.compile("[\ud800-\udfff]")


class Encoder(Protocol):
    """What the data scheduler needs from a tokenizer."""

    name: str
    """Which library encodes: `gigatoken`, `tokenizers` or `sentencepiece`."""
    vocab_size: int
    """One more than the largest token id, special and added tokens included."""
    eos_id: int
    """The token that ends a document."""
    bos_id: int | None
    """The token that begins a document, where the tokenizer has one."""
    fingerprint: str
    """SHA-256 (hex) of the tokenizer's definition file; equal fingerprints give equal tokens."""

    def encode_batch(self, texts: Sequence[Text]) -> tuple[Tokens, Offsets]:
        """Encode each text by itself, adding no special token.

        Returns (tokens uint32[total], offsets int64[len(texts) + 1]); text i has tokens[offsets[i] : offsets[i + 1]].
        """

    def encode(self, text: Text) -> Tokens:
        """One text's tokens, uint32[n]; the same as from `encode_batch`."""

    def decode(self, ids: Sequence[int] | Tokens) -> str:
        """The text of `ids`, special tokens spelled out; bytes that are not UTF-8 become U+FFFD."""

    def special_id(self, name: str) -> int | None:
        """The id of a special token, which no text can spell; None when there is none of that name."""


def as_text(text: Text) -> str:
    """`text` as a str that UTF-8 can hold: what cannot be decoded, and lone surrogates, become U+FFFD."""
    if isinstance(text, bytes):
        return text.decode("utf-8", "replace")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return _SURROGATE.sub("\ufffd", text)
    return text


def as_utf8(text: Text) -> bytes:
    """`as_text(text)` in UTF-8; bytes that are valid already are returned as they are."""
    try:
        if isinstance(text, bytes):
            text.decode("utf-8")  # A check only: 1-10 GB/s, about 2 % of the encoding time.
            return text
        return text.encode("utf-8")
    except UnicodeError:
        return as_text(text).encode("utf-8")


def _joined(rows: Sequence[Tokens]) -> tuple[Tokens, Offsets]:
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    return np.concatenate([np.empty(0, np.uint32), *rows]), offsets


class HuggingFaceEncoder:
    """The reference for every `tokenizer.json`: Hugging Face `tokenizers` itself, 1 to 3 MB per CPU-second.

    `tokenizers` has one switch for its threads, the environment variable TOKENIZERS_PARALLELISM; unless the user has
    set it, this sets it to false, because the scheduler's threads already use the cores.
    """

    name = "tokenizers"

    def __init__(self, definition: str, eos_id: int, bos_id: int | None, fingerprint: str) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.tokenizer: Tokenizer = Tokenizer.from_str(definition)
        self.tokenizer.encode_special_tokens = True  # Special tokens in the text are text.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.vocab_size = max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.eos_id = eos_id
        self.bos_id = bos_id
        self.fingerprint = fingerprint

    def encode_batch(self, texts: Sequence[Text]) -> tuple[Tokens, Offsets]:
        encodings = self.tokenizer.encode_batch_fast([as_text(text) for text in texts], add_special_tokens=False)
        return _joined([np.array(encoding.ids, np.uint32) for encoding in encodings])

    def encode(self, text: Text) -> Tokens:
        return self.encode_batch([text])[0]

    def decode(self, ids: Sequence[int] | Tokens) -> str:
        return str(self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False))

    def special_id(self, name: str) -> int | None:
        number: int | None = self.tokenizer.token_to_id(name)
        added = self.tokenizer.get_added_tokens_decoder()
        return number if number in added and added[number].special else None


class SentencePieceEncoder:
    """The reference for a SentencePiece `.model`: the `sentencepiece` package itself, 5 MB per CPU-second.

    SentencePiece never reads control symbols (`</s>`) from text, so no boundary can be forged here either.
    """

    name = "sentencepiece"

    def __init__(self, definition: bytes, eos_id: int, bos_id: int | None) -> None:
        self.processor = sentencepiece_processor(definition)
        self.vocab_size = int(self.processor.get_piece_size())
        self.eos_id = eos_id
        self.bos_id = bos_id
        self.fingerprint = hashlib.sha256(definition).hexdigest()

    def encode_batch(self, texts: Sequence[Text]) -> tuple[Tokens, Offsets]:
        rows = self.processor.encode([as_text(text) for text in texts], out_type=int, num_threads=1)
        return _joined([np.array(row, np.uint32) for row in rows])

    def encode(self, text: Text) -> Tokens:
        return self.encode_batch([text])[0]

    def decode(self, ids: Sequence[int] | Tokens) -> str:
        return str(self.processor.decode([int(i) for i in ids]))

    def special_id(self, name: str) -> int | None:
        number = int(self.processor.piece_to_id(name))
        return number if self.processor.is_control(number) else None


class GigatokenEncoder:
    """The fast encoder, over a reference that it must agree with; `decode` and all ids are the reference's.

    Encodes on the calling thread with the GIL released, and may be called from several threads at once.
    `definition` is a `tokenizer.json` without its special tokens, so that none can be matched in text.

    The library remembers every word it has met, 90 bytes each, for as long as its tokenizer lives: 47 MB after 0.2 GB
    of code, and a run of weeks would fill the machine. So the tokenizer is made anew after `REMADE_BYTES` of text.
    """

    name = "gigatoken"

    def __init__(self, definition: str, reference: Encoder) -> None:
        self._definition = definition
        self._make()
        self.reference = reference
        self.vocab_size = reference.vocab_size
        self.eos_id = reference.eos_id
        self.bos_id = reference.bos_id
        self.fingerprint = reference.fingerprint

    def encode_batch(self, texts: Sequence[Text]) -> tuple[Tokens, Offsets]:
        return _joined([self.encode(text) for text in texts])

    def encode(self, text: Text) -> Tokens:
        self._encoded += len(text)  # two threads may lose a little of it
        if self._encoded > REMADE_BYTES:
            self._make()
        try:
            # A str that UTF-8 can hold is read where it lies: copying it costs 2 % of encoding it.
            tokens: Tokens = self._encode(text if isinstance(text, str) else as_utf8(text))
        except TypeError:  # a lone surrogate
            tokens = self._encode(as_utf8(text))
        return tokens

    def _make(self) -> None:
        import gigatoken

        self.tokenizer: Any = gigatoken.Tokenizer.from_json(self._definition)
        self._encode: Callable[[Text], Tokens] = self.tokenizer.backend.encode
        self._encoded = 0

    def decode(self, ids: Sequence[int] | Tokens) -> str:
        return self.reference.decode(ids)

    def special_id(self, name: str) -> int | None:
        return self.reference.special_id(name)


def load_encoder(path: str | Path, fast: bool = True, samples: Sequence[str] = ()) -> Encoder:
    """The encoder of a `tokenizer.json`, of a folder that holds one, or of a SentencePiece `.model`.

    With `fast`, gigatoken encodes if it agrees with the reference on every built-in text and every one of `samples`;
    otherwise the reference does, and one warning on the logger `headrace.data` says why.

    Raises ConfigError when there is no tokenizer at `path`, when it cannot be read, when a package it needs is missing,
    or when it has no token that ends a document.
    """
    file = _definition_file(Path(path))
    build = _build_sentencepiece if file.suffix == ".model" else _build_huggingface
    reference, fast_definition, special_tokens = build(file)
    texts = [*check_texts(special_tokens), *(as_text(text) for text in samples)]
    _refuse_forged_boundaries(reference, special_tokens, file)
    if not fast:
        return reference
    try:
        candidate = GigatokenEncoder(fast_definition(), reference)
        problem = first_difference(reference, candidate, texts)
    except Exception as error:  # A tokenizer that gigatoken does not know, or cannot encode some text with.
        problem = str(error).partition("\n")[0] or type(error).__name__
    if problem is None:
        return candidate
    log.warning("tokenizer %s: encoding with %s, the fast encoder differs: %s", file, reference.name, problem)
    return reference


def _definition_file(path: Path) -> Path:
    if path.is_dir():
        for name in ("tokenizer.json", "tokenizer.model"):
            if (path / name).is_file():
                return path / name
        raise ConfigError(
            f"tokenizer {path}: no tokenizer.json or tokenizer.model in this folder; "
            "train one with `headrace tokenizer train` or save one with transformers' save_pretrained"
        )
    if not path.is_file():
        raise ConfigError(
            f"tokenizer {path}: no such file or folder; give a tokenizer.json, a folder that holds one, or a "
            "SentencePiece .model (`headrace tokenizer train` makes one)"
        )
    return path


Built = tuple[Encoder, Callable[[], str], list[str]]


def _build_huggingface(file: Path) -> Built:
    try:
        definition = file.read_text("utf-8")
        fields = json.loads(definition)
        tokenizer = Tokenizer.from_str(definition)
    except Exception as error:  # tokenizers raises bare Exception
        line = str(error).partition("\n")[0]
        raise ConfigError(f"tokenizer {file}: not a Hugging Face tokenizer.json: {line}") from None
    config = _tokenizer_config(file)
    eos = _special_token(config.get("eos_token"), EOS_NAMES, tokenizer.token_to_id)
    bos = _special_token(config.get("bos_token"), BOS_NAMES, tokenizer.token_to_id)
    if eos is None:
        raise _no_eos(file)
    added = fields.get("added_tokens") or []
    for token in added:
        # Some tokenizers forget to mark their boundaries as special; here they are, whatever the file says.
        token["special"] = token.get("special") or token["content"] in (eos, bos)
    specials = list(dict.fromkeys([eos, *(token["content"] for token in added if token["special"])]))
    eos_id, bos_id = tokenizer.token_to_id(eos), None if bos is None else tokenizer.token_to_id(bos)
    assert eos_id is not None

    def fast_definition() -> str:
        # The post-processor and the special tokens only add boundaries; neither belongs to encoding text.
        kept = [token for token in added if not token["special"]]
        return json.dumps({**fields, "added_tokens": kept, "post_processor": None, "truncation": None, "padding": None})

    fingerprint = hashlib.sha256(definition.encode()).hexdigest()
    reference = HuggingFaceEncoder(json.dumps(fields), eos_id, bos_id, fingerprint)
    return reference, fast_definition, specials


def _build_sentencepiece(file: Path) -> Built:
    definition = file.read_bytes()
    processor = sentencepiece_processor(definition, file)
    if processor.eos_id() < 0:
        raise _no_eos(file)
    bos_id = processor.bos_id() if processor.bos_id() >= 0 else None
    specials = [processor.id_to_piece(i) for i in range(processor.get_piece_size()) if processor.is_control(i)]

    def fast_definition() -> str:
        from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

        fields = json.loads(sentencepiece_to_tokenizer_json(definition))
        fields["added_tokens"] = [t for t in fields.get("added_tokens") or [] if t["content"] not in specials]
        return json.dumps(fields)

    return SentencePieceEncoder(definition, processor.eos_id(), bos_id), fast_definition, specials


def sentencepiece_processor(definition: bytes, file: Path | str = "SentencePiece model") -> Any:
    """A `SentencePieceProcessor`. Raises ConfigError when the package is missing or `definition` is not a model."""
    try:
        import sentencepiece
    except ImportError:
        raise ConfigError(
            f"tokenizer {file}: a SentencePiece model needs the package sentencepiece; `pip install sentencepiece`, "
            "or convert the model to a tokenizer.json with transformers"
        ) from None
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=definition)
    except RuntimeError as error:
        raise ConfigError(f"tokenizer {file}: not a SentencePiece model: {str(error).strip()}") from None


def _tokenizer_config(file: Path) -> dict[str, Any]:
    """`tokenizer_config.json` beside the file, where Hugging Face names the special tokens' roles; {} without one."""
    try:
        config = json.loads((file.parent / "tokenizer_config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _special_token(configured: Any, names: Sequence[str], find: Callable[[str], int | None]) -> str | None:
    """The configured token (a string or an object with `content`), else the first known name, that there is."""
    if isinstance(configured, dict):
        configured = configured.get("content")
    candidates = (configured, *names) if isinstance(configured, str) else names
    return next((name for name in candidates if find(name) is not None), None)


def _no_eos(file: Path) -> ConfigError:
    return ConfigError(
        f"tokenizer {file}: no token ends a document; name it as `eos_token` in tokenizer_config.json beside it, "
        f"or add one of {', '.join(EOS_NAMES)} to the tokenizer"
    )


def _refuse_forged_boundaries(reference: Encoder, special_tokens: Sequence[str], file: Path) -> None:
    """A tokenizer whose plain vocabulary can spell its own end-of-document token cannot keep documents apart."""
    tokens, offsets = reference.encode_batch([*special_tokens, *(f" {token} " for token in special_tokens)])
    forged = np.flatnonzero(tokens == reference.eos_id)
    if len(forged):
        i = int(np.searchsorted(offsets, forged[0], side="right")) - 1
        token = special_tokens[i % len(special_tokens)]
        raise ConfigError(
            f"tokenizer {file}: the text {token!r} is encoded as the end-of-document token; "
            "name an end-of-document token that no text can spell as `eos_token` in tokenizer_config.json beside it"
        )
