"""How many bytes of text tokens stand for, so that losses per token become bits per byte.

    counter = ByteCounter(encoder)
    counter.count(tokens, counted)     # UTF-8 bytes of the text of tokens[counted]

Losses per token of two tokenizers cannot be compared, losses per byte can. A token that holds a part of a character
stands for that part's bytes, which decoding it by itself would not say; so for byte-level and SentencePiece tokenizers
bytes come from the vocabulary. Special tokens stand for no text: 0 bytes.
"""

import json
import re
from typing import Any

import numpy as np
import numpy.typing as npt

from data_scheduler.encoder import Encoder, HuggingFaceEncoder, SentencePieceEncoder

Int64 = npt.NDArray[np.int64]

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "\u2581"
_PROBE = "a"


def _byte_alphabet() -> frozenset[str]:
    """The 256 characters by which byte-level tokenizers write bytes: printable Latin-1, and 68 from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return frozenset(map(chr, [*printable, *range(0x100, 0x100 + 256 - len(printable))]))


_ALPHABET = _byte_alphabet()


class ByteCounter:
    """Counts bytes of one tokenizer's tokens."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        reference = getattr(encoder, "reference", encoder)
        self._special = _special_ids(reference)
        self._table = _table(reference, self._special)
        self._lead = 0 if self._table is None else int(self._table[encoder.encode(_PROBE)].sum()) - len(_PROBE)
        """Bytes of the space that some tokenizers put before a text; the text does not have it."""

    def count(self, tokens: Int64, counted: npt.NDArray[np.bool_]) -> int:
        """UTF-8 bytes of the text that those of `tokens` int64[n] stand for where `counted` bool[n] is true.

        With a tokenizer whose vocabulary does not tell (words, single characters) they are those by which each run of
        counted tokens lengthens the decoded text.
        """
        if self._table is None:
            return self._by_decoding(tokens, counted)
        total = int(self._table[tokens[counted]].sum())
        if self._lead and self._encoder.bos_id is not None:
            first = np.flatnonzero(counted[1:] & (tokens[:-1] == self._encoder.bos_id)) + 1
            total -= self._lead * sum(self._table[tokens[first]] > 0)
        return total

    def _by_decoding(self, tokens: Int64, counted: npt.NDArray[np.bool_]) -> int:
        total = 0
        ends = [*(np.flatnonzero(np.diff(counted)) + 1).tolist(), len(tokens)]
        for begin, end in zip([0, *ends], ends, strict=False):
            if counted[begin]:
                total += self._length(tokens[:end]) - self._length(tokens[:begin])
        return total

    def _length(self, tokens: Int64) -> int:
        text = [token for token in tokens.tolist() if token not in self._special]
        return len(self._encoder.decode(text).encode("utf-8", "replace")) if text else 0


def _special_ids(reference: Encoder) -> frozenset[int]:
    if isinstance(reference, HuggingFaceEncoder):
        return frozenset(i for i, token in reference.tokenizer.get_added_tokens_decoder().items() if token.special)
    if isinstance(reference, SentencePieceEncoder):
        return frozenset(i for i in range(reference.vocab_size) if reference.processor.is_control(i))
    return frozenset()


def _table(reference: Encoder, special: frozenset[int]) -> Int64 | None:
    """int64[vocab_size]: bytes of each token; None where a token by itself does not tell."""
    if isinstance(reference, SentencePieceEncoder):
        pieces = {i: reference.processor.id_to_piece(i) for i in range(reference.vocab_size)}
        pieces[reference.processor.unk_id()] = reference.decode([reference.processor.unk_id()])
        length = _piece_bytes
    elif isinstance(reference, HuggingFaceEncoder):
        kinds = _decoders(json.loads(reference.tokenizer.to_str()).get("decoder"))
        if "ByteLevel" in kinds:
            length = _byte_level_bytes
        elif kinds & {"ByteFallback", "Metaspace"}:
            length = _piece_bytes
        else:
            return None
        pieces = {i: piece for piece, i in reference.tokenizer.get_vocab(with_added_tokens=True).items()}
    else:
        return None
    table = np.zeros(reference.vocab_size, np.int64)
    for i, piece in pieces.items():
        if i not in special:
            table[i] = length(piece)
    return table


def _decoders(decoder: Any) -> set[str]:
    if not isinstance(decoder, dict):
        return set()
    return {decoder["type"]}.union(*(_decoders(inner) for inner in decoder.get("decoders", ())))


def _byte_level_bytes(piece: str) -> int:
    # An added token with another character in it is taken literally as a whole, as the decoder does.
    return len(piece) if _ALPHABET.issuperset(piece) else len(piece.encode("utf-8"))


def _piece_bytes(piece: str) -> int:
    return 1 if _BYTE.fullmatch(piece) else len(piece.replace(_SPACE, " ").encode("utf-8"))
