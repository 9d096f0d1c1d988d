"""The trained tokenizer keeps Nyonic's rules whatever it was trained on, and is the same file every time."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from data_scheduler import encoder as encoder_module
from data_scheduler.encoder import Encoder, as_text, load_encoder
from data_scheduler.encoder_check import check_texts, first_difference
from data_scheduler.tokenizer_training import (
    MIN_VOCAB_SIZE,
    SPECIAL_TOKENS,
    WORD_PATTERN,
    train_tokenizer,
)
from headrace.errors import ConfigError

SOURCE = Path(encoder_module.__file__).read_text()
LONGEST_SPACE_RUN = 24  # Nyonic's number, on purpose not the module's
CORPORA = {
    "code": [SOURCE, json.__doc__ or "", Path(json.__file__).read_text()],
    # Nothing here ever has two spaces in a row: the runs must come from the rule, not from the text.
    "no runs": [" ".join(SOURCE.split())],
    "no spaces": ["".join(SOURCE.split())],
    "digits": ["3.14159 26535 1024 2048 4096 " * 50 + "10101010" * 50],
    "tiny": ["ab"],
}


@pytest.fixture(scope="module", params=list(CORPORA))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(CORPORA[request.param], 700, out)
    return out


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return load_encoder(folder)


def pieces(encoder: Encoder, text: str) -> list[str]:
    return [encoder.decode([int(i)]) for i in encoder.encode_batch([text])[0]]


def test_the_fast_path_is_active_and_exact(folder: Path, encoder: Encoder) -> None:
    assert encoder.name == "gigatoken"
    reference = load_encoder(folder, fast=False)
    assert first_difference(reference, encoder, check_texts(SPECIAL_TOKENS, seed=2, seams=2000)) is None


def test_every_run_of_1_to_24_spaces_is_one_token(encoder: Encoder) -> None:
    for n in range(1, LONGEST_SPACE_RUN + 1):
        run = " " * n
        assert pieces(encoder, run) == [run]
        for before, after in (("x", "1"), ("7", "\n"), ("\n", "\t"), ("(", ""), ("", "9"), ("\t", "5")):
            assert run in pieces(encoder, f"{before}{run}{after}"), (before, n, after)
    for n in range(2, LONGEST_SPACE_RUN + 1):
        for before, after in (("x", "y"), ("\n", "return"), ("é", "漢"), (".", "'s"), ("", "=="), ("'", '"')):
            assert " " * n in pieces(encoder, f"{before}{' ' * n}{after}"), (before, n, after)


def test_longer_runs_are_split_into_runs_of_24(encoder: Encoder) -> None:
    for n in range(LONGEST_SPACE_RUN + 1, 120):
        full, rest = divmod(n, LONGEST_SPACE_RUN)
        assert pieces(encoder, " " * n) == [" " * LONGEST_SPACE_RUN] * full + ([" " * rest] if rest else [])


def test_digits_stand_alone(encoder: Encoder) -> None:
    for text in ("1024", "3.14", "x12y", "a 10101010 b", "0x1F", "1e-9", "٢٠٢٤", "१२३", "10 11"):
        for piece in pieces(encoder, text):
            assert len(piece) == 1 or not any(c.isdigit() for c in piece), (text, piece)


def test_no_token_of_the_vocabulary_joins_a_digit(folder: Path) -> None:
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    for token in vocabulary:
        assert token in SPECIAL_TOKENS or len(token) == 1 or not any(c in "0123456789" for c in token), token


def test_every_byte_is_in_the_vocabulary_and_the_fixed_ids_hold(folder: Path, encoder: Encoder) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    vocabulary = tokenizer.get_vocab()
    assert set(ByteLevel.alphabet()) <= set(vocabulary)
    assert [tokenizer.id_to_token(i) for i in range(8)] == list(SPECIAL_TOKENS)
    assert tokenizer.id_to_token(0) == "<|endoftext|>"
    assert encoder.eos_id == 0
    assert sorted(vocabulary.values()) == list(range(len(vocabulary))), "no id twice, none left out"
    assert encoder.vocab_size == len(vocabulary) <= 700


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.text(st.characters(codec=None)),
        st.lists(
            st.sampled_from([" ", "   ", " " * 25, "\n", "\r\n", "\t", "a", "The", "'s", "1", "é", "e\u0301", "😀"])
        ).map("".join),
    )
)
def test_decoding_gives_the_text_back(encoder: Encoder, text: str) -> None:
    tokens, _ = encoder.encode_batch([text])
    assert encoder.decode(tokens) == as_text(text)


def test_same_texts_same_bytes_in_another_process(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from data_scheduler.tokenizer_training import train_tokenizer;"
        "train_tokenizer([Path(sys.argv[1]).read_text()] * 3, 600, Path(sys.argv[2]))"
    )
    written = []
    for run in range(2):
        out = tmp_path / str(run)
        environment = {**os.environ, "PYTHONHASHSEED": str(run), "RAYON_NUM_THREADS": str(1 + run)}
        command: Sequence[str] = [sys.executable, "-c", program, encoder_module.__file__, str(out)]
        subprocess.run(command, env=environment, check=True, timeout=120)
        written.append({file.name: file.read_bytes() for file in out.iterdir()})
    assert written[0] == written[1]
    assert set(written[0]) == {"tokenizer.json", "tokenizer_config.json"}


def test_vocabulary_size_is_what_was_asked(tmp_path: Path) -> None:
    for size in (MIN_VOCAB_SIZE, 400, 1000):
        trained = train_tokenizer(CORPORA["code"], size, tmp_path / str(size))
        assert trained.vocab_size == load_encoder(trained.path).vocab_size == size
    assert trained.documents == 3
    assert trained.bytes == sum(len(text.encode()) for text in CORPORA["code"])
    sizes = [len(load_encoder(tmp_path / str(size)).encode_batch([SOURCE])[0]) for size in (MIN_VOCAB_SIZE, 400, 1000)]
    assert all(a > b for a, b in pairwise(sizes)), "more merges, fewer tokens"


def test_progress_counts_documents_and_bytes(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    train_tokenizer(["aé", "\ud800", "bb"], MIN_VOCAB_SIZE, tmp_path, lambda *counts: seen.append(counts))
    assert [documents for documents, _ in seen] == [1, 2, 3]
    assert seen[0] == (1, 3)


def test_transformers_loads_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    train_tokenizer(CORPORA["code"], 700, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    encoder = load_encoder(tmp_path)
    assert isinstance(tokenizer, transformers.PreTrainedTokenizerFast)
    assert (len(tokenizer), tokenizer.eos_token_id) == (700, 0)
    text = "def f(x):\n        return  x ** 21 , x"
    assert tokenizer(text)["input_ids"] == encoder.encode_batch([text])[0].tolist()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_impossible_wishes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"vocabulary of {MIN_VOCAB_SIZE - 1}: at least {MIN_VOCAB_SIZE} are needed"):
        train_tokenizer(["text"], MIN_VOCAB_SIZE - 1, tmp_path / "small")
    for nothing in ([], ["", ""]):
        with pytest.raises(ConfigError, match="no text to train a tokenizer on"):
            train_tokenizer(nothing, 500, tmp_path / "empty")
    assert not (tmp_path / "empty").exists()
    assert not (tmp_path / "small").exists()


def test_the_pattern_is_one_that_the_fast_encoder_knows(folder: Path) -> None:
    fields = json.loads((folder / "tokenizer.json").read_text())
    assert fields["pre_tokenizer"]["pretokenizers"][0]["pattern"] == {"Regex": WORD_PATTERN}


def test_special_tokens_of_ones_own(tmp_path: Path) -> None:
    names = ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"]
    train_tokenizer([SOURCE], 400, tmp_path, special_tokens=names)
    encoder = load_encoder(tmp_path)
    assert encoder.name == "gigatoken"
    assert [encoder.special_id(name) for name in names] == [8, 9, 10]
    assert encoder.special_id("<|endoftext|>") == 0
    assert encoder.special_id("a") is None
    assert encoder.special_id("<|no_such|>") is None
    assert not set(encoder.encode("".join(names)).tolist()) & {8, 9, 10}, "text spells none of them"
    for wrong in (["<|x|>", "<|x|>"], ["<|endoftext|>"], [" "]):
        with pytest.raises(ConfigError, match="give each name once"):
            train_tokenizer([SOURCE], 400, tmp_path / "wrong", special_tokens=wrong)
