"""Train a byte-level BPE tokenizer to Nyonic's rules (arXiv 2404.15702): spaces, digits, bytes.

- **Spaces.** A run of 2 to 24 spaces is one token wherever it stands, so indentation costs one token and says how deep
  it is. A longer run is cut into runs of 24 from the left. A single space opens the word after it (`" the"` is one
  token), or is a token of its own where no word follows.
- **Digits.** Every digit is a token of its own, in any script, so numbers of equal length have equally many tokens.
- **Bytes.** All 256 bytes are in the vocabulary: any text can be encoded, nothing is unknown, decoding gives it back.

The space runs are added tokens that are not special (as in GPT-NeoX), found before the split into words. With merges
alone they could not be had: the usual patterns leave the last space of a run to the word after it, and make two tokens
of a run before a digit. Matching them costs speed in gigatoken (57 against 200 MB per CPU-second on code, 110 against
178 on prose), still 40 times the reference. The pattern is Qwen 3.5's, which keeps combining marks with their letters
and is one of those that gigatoken encodes exactly.

Ids: 0 `<|endoftext|>`, 1-7 reserved special tokens, then those asked for, 256 bytes, the merges, and last the 23 space
runs.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from data_scheduler.encoder import as_text
from headrace.errors import ConfigError

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, *(f"<|reserved_{i}|>" for i in range(1, 8)))
LONGEST_SPACE_RUN = 24
SPACE_RUNS = tuple(" " * n for n in range(2, LONGEST_SPACE_RUN + 1))
MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256 + len(SPACE_RUNS)
# gigatoken knows a fixed list of patterns; one character of difference would lose the fast path.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_RUN = re.compile(" {2,}")


class TrainedTokenizer(NamedTuple):
    """What training gave. `vocab_size` is below what was asked when the text has too few distinct pairs to merge."""

    path: Path
    vocab_size: int
    documents: int
    bytes: int


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    out: Path,
    progress: Callable[[int, int], None] | None = None,
    special_tokens: Sequence[str] = (),
) -> TrainedTokenizer:
    """Train on `texts` and write `tokenizer.json` and `tokenizer_config.json` (for transformers) into the folder `out`.

    The same texts in the same order give the same bytes. `progress` is called with the documents and bytes read so far;
    it is not called any more while the merges are computed. A pair must occur twice to be merged. `special_tokens`
    come behind the fixed ones.
    Raises ConfigError when `vocab_size` cannot hold the fixed tokens, when there is no text, or for a special token
    that is empty or given twice.
    """
    specials = [*SPECIAL_TOKENS, *special_tokens]
    unfit = [name for place, name in enumerate(specials) if not name.strip() or name in specials[:place]]
    if unfit:
        raise ConfigError(f"special token {unfit[0]!r}: give each name once; {', '.join(SPECIAL_TOKENS)} are there")
    least = MIN_VOCAB_SIZE + len(special_tokens)
    if vocab_size < least:
        raise ConfigError(
            f"vocabulary of {vocab_size}: at least {least} are needed "
            f"({len(specials)} special tokens, 256 bytes, {len(SPACE_RUNS)} space runs)"
        )
    documents = size = 0

    def pieces() -> Iterator[list[str]]:
        nonlocal documents, size
        for text in texts:
            documents += 1
            size += len(text.encode("utf-8", "replace"))
            # Cut as encoding will cut it, so that no merge is spent on what it never sees.
            yield [piece for piece in _RUN.split(as_text(text)) if piece]
            if progress is not None:
                progress(documents, size)

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPACE_RUNS),
        min_frequency=2,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pieces(), trainer)
    if size == 0:
        raise ConfigError("no text to train a tokenizer on; check the data and the name of its text field")
    tokenizer.add_tokens([AddedToken(run, normalized=False, special=False) for run in SPACE_RUNS])

    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", "utf-8")
    (out / "tokenizer_config.json").write_text(json.dumps(_TRANSFORMERS_CONFIG, indent=2) + "\n", "utf-8")
    return TrainedTokenizer(out / "tokenizer.json", tokenizer.get_vocab_size(), documents, size)


_TRANSFORMERS_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": END_OF_TEXT,
    "pad_token": END_OF_TEXT,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 1_000_000_000,
}
