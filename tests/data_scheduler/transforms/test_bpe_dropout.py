"""BPE-dropout: the tokenizer's own tokens at p = 0, the same text at every p, the paper's distribution."""

import collections
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from data_scheduler.encoder import Encoder, as_text, load_encoder
from data_scheduler.encoder_check import check_texts
from data_scheduler.tokenizer_training import train_tokenizer
from data_scheduler.transforms.bpe_dropout import DropoutEncoder
from headrace.errors import ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with space runs, single digits and a thousand merges."""
    out = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([Path(__file__).read_text(), *check_texts(seams=300)], 1200, out)
    return out


@pytest.fixture(scope="module")
def dropout(folder: Path) -> DropoutEncoder:
    return DropoutEncoder(load_encoder(folder))


@pytest.fixture(scope="module")
def plain(folder: Path) -> Encoder:
    return load_encoder(folder, fast=False)


TEXTS = check_texts(["<|endoftext|>"], seed=5, seams=300)


def test_without_dropout_it_is_the_encoder(plain: Encoder, dropout: DropoutEncoder) -> None:
    for text in TEXTS:
        # So small a p never drops, but goes the whole way: the words' merges are made again and counted.
        for p in (0.0, 1e-15):
            assert np.array_equal(dropout.encode(text, p, "x"), plain.encode(text)), (text, p)
    assert all(dropout._symbols((token,)) for token in range(8, plain.vocab_size))


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_every_p_gives_the_text_back(plain: Encoder, dropout: DropoutEncoder, p: float) -> None:
    for number, text in enumerate(TEXTS):
        tokens = dropout.encode(text, p, "seed", number)
        assert plain.decode(tokens) == text
        assert len(tokens) >= len(plain.encode(text))
        assert not (tokens < 8).any(), "no boundary can be forged"


@given(st.text(max_size=200), st.floats(0, 1), st.integers())
def test_any_text(plain: Encoder, dropout: DropoutEncoder, text: str, p: float, seed: int) -> None:
    tokens = dropout.encode(text, p, seed)
    assert plain.decode(tokens) == as_text(text)
    assert np.array_equal(tokens, dropout.encode(text, p, seed))


def test_all_dropped_is_bytes(folder: Path, dropout: DropoutEncoder) -> None:
    text = "naïve merging 漢字"
    assert len(dropout.encode(text, 1.0, "x")) == len(text.encode())


def small(tmp_path: Path, words: list[str], merges: list[tuple[str, str]], **options: object) -> DropoutEncoder:
    symbols = sorted(set("".join(words)))
    vocab = {name: number for number, name in enumerate([*symbols, *("".join(pair) for pair in merges)])}
    for word in words:
        vocab.setdefault(word, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, merges, **options))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return DropoutEncoder(load_encoder(tmp_path / "tokenizer.json", fast=False))


def test_the_distribution_is_the_papers(tmp_path: Path) -> None:
    """`abc` with merges ab, bc, abc: every way worked out by hand, p = 0.3.

    ab is made first (0.7), then abc is made (0.7) or not; else bc is made (0.3 · 0.7), which nothing follows.
    """
    dropout = small(tmp_path, ["abc"], [("a", "b"), ("b", "c"), ("ab", "c")])
    names = ["a", "b", "c", "ab", "bc", "abc"]
    found = collections.Counter(
        " ".join(names[token] for token in dropout.encode("abc", 0.3, "run", number)) for number in range(6_000)
    )
    expected = {"abc": 0.7 * 0.7, "ab c": 0.7 * 0.3, "a bc": 0.3 * 0.7, "a b c": 0.3 * 0.3}
    assert set(found) == set(expected)
    for cut, chance in expected.items():
        assert found[cut] / 6_000 == pytest.approx(chance, abs=0.02), cut


def test_it_is_distributed_as_in_tokenizers(folder: Path, dropout: DropoutEncoder) -> None:
    """The library's own dropout, which cannot be seeded, has the same mean number of tokens."""
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["model"]["dropout"] = 0.2
    theirs = Tokenizer.from_str(json.dumps(definition))
    text = " ".join(TEXTS[1:5]) * 3
    library = np.mean([len(theirs.encode(text, add_special_tokens=False).ids) for _ in range(60)])
    assert len({tuple(theirs.encode(text).ids) for _ in range(5)}) > 1, "it is not seeded"
    ours = np.mean([len(dropout.encode(text, 0.2, number)) for number in range(60)])
    assert ours == pytest.approx(library, rel=0.01)


def test_a_word_that_merges_do_not_make_keeps_its_token(tmp_path: Path) -> None:
    """With `ignore_merges`, as in Llama 3, whole words come from the vocabulary."""
    merges = [("b", "c"), ("a", "b"), ("c", "d"), ("ab", "cd")]  # b and c come first, so that nothing makes abcd
    dropout = small(tmp_path, ["abcd", "cab", "dabc"], merges, ignore_merges=True)
    plain = load_encoder(tmp_path / "tokenizer.json", fast=False)
    assert len(plain.encode("abcd")) == 1
    assert np.array_equal(dropout.encode("abcd cab dabc", 1e-15, 0), plain.encode("abcd cab dabc"))
    assert np.array_equal(dropout.encode("abcd", 1.0, 0), plain.encode("abcd"))


def test_a_very_long_word_does_not_take_its_square(dropout: DropoutEncoder, plain: Encoder) -> None:
    text = "ab" * 30_000
    assert plain.decode(dropout.encode(text, 0.1, 0)) == text


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(
        ConfigError, match=r"bpe_dropout needs a BPE tokenizer.json, this tokenizer is of kind WordPiece"
    ):
        DropoutEncoder(load_encoder(tmp_path / "tokenizer.json", fast=False))
