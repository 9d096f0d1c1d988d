"""Encoders: the fast one equals the reference, no text can forge a boundary, and what is wrong is said."""

import json
import logging
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from data_scheduler import encoder as encoder_module
from data_scheduler.encoder import GigatokenEncoder, HuggingFaceEncoder, as_text, as_utf8, load_encoder
from data_scheduler.encoder_check import check_texts, first_difference
from headrace.errors import ConfigError

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TEXTS = [Path(module.__file__ or "").read_text() for module in (encoder_module, json, logging, random)]


def save_tokenizer(
    folder: Path,
    pattern: str | None = LLAMA3,
    specials: tuple[str, ...] = ("<|endoftext|>", "<|other|>"),
    change: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """A small byte-level BPE; `pattern` None is the GPT-2 pre-tokenizer; `change` edits the JSON."""
    tokenizer = Tokenizer(models.BPE())
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, to_bytes]) if split else to_bytes
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=list(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens([AddedToken("<tag>", normalized=False, special=False)])
    if specials:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{specials[0]} $A {specials[0]}", special_tokens=[(specials[0], tokenizer.token_to_id(specials[0]))]
        )
    tokenizer.enable_truncation(50)
    fields = json.loads(tokenizer.to_str())
    if change is not None:
        change(fields)
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(fields), "utf-8")
    return file


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def fast(file: Path) -> GigatokenEncoder:
    encoder = load_encoder(file, samples=TEXTS)
    assert isinstance(encoder, GigatokenEncoder), "the fast path must be active for a tokenizer it knows"
    return encoder


@pytest.fixture(scope="module")
def reference(file: Path) -> HuggingFaceEncoder:
    encoder = load_encoder(file, fast=False)
    assert isinstance(encoder, HuggingFaceEncoder)
    return encoder


def test_encoders_share_everything_but_speed(fast: GigatokenEncoder, reference: HuggingFaceEncoder) -> None:
    assert (fast.name, reference.name) == ("gigatoken", "tokenizers")
    for field in ("vocab_size", "eos_id", "bos_id", "fingerprint"):
        assert getattr(fast, field) == getattr(reference, field)
    assert fast.eos_id == 0
    assert fast.bos_id is None
    assert fast.vocab_size == 901
    assert len(fast.fingerprint) == 64


@pytest.mark.parametrize("pattern", [None, LLAMA3])
def test_fast_equals_reference(tmp_path: Path, pattern: str | None) -> None:
    file = save_tokenizer(tmp_path, pattern)
    fast, reference = load_encoder(file), load_encoder(file, fast=False)
    assert fast.name == "gigatoken"
    # Another seed than the one the loader checks with.
    assert first_difference(reference, fast, check_texts(["<|other|>", "<tag>"], seed=1, seams=3000)) is None


@pytest.mark.parametrize("which", ["fast", "reference"])
def test_result_is_flat_and_adds_nothing(which: str, request: pytest.FixtureRequest) -> None:
    encoder = request.getfixturevalue(which)
    texts = ["one two", "", b"three", "x" * 5000, "vier ünf", ""]
    tokens, offsets = encoder.encode_batch(texts)
    assert (tokens.dtype, offsets.dtype) == (np.uint32, np.int64)
    assert tokens.ndim == 1
    assert tokens.flags.c_contiguous
    assert offsets.shape == (len(texts) + 1,)
    assert (offsets[0], offsets[-1]) == (0, len(tokens))
    assert encoder.eos_id not in tokens, "the post-processor's boundaries are not added"
    for i, text in enumerate(texts):
        ids = tokens[offsets[i] : offsets[i + 1]]
        assert encoder.decode(ids) == as_text(text), "nothing is truncated"
    empty, bounds = encoder.encode_batch([])
    assert (len(empty), bounds.tolist()) == (0, [0])
    assert (empty.dtype, bounds.dtype) == (np.uint32, np.int64)


@pytest.mark.parametrize("rows", [1, 3, 64, 65, 300])
@pytest.mark.parametrize("size", [10, 9000])
def test_both_ways_into_gigatoken_agree(
    fast: GigatokenEncoder, reference: HuggingFaceEncoder, rows: int, size: int
) -> None:
    """Small and large batches go through different calls, on either side of 64 rows and of 256 KiB."""
    source = "".join(TEXTS) * 2
    texts = [source[i * 37 % 5000 :][: size if i % 5 else i % 3] for i in range(rows)]
    if rows * size > 300_000:
        texts = [text[:1500] for text in texts]
    assert first_difference(reference, fast, texts) is None


@pytest.mark.parametrize("which", ["fast", "reference"])
def test_no_text_forges_a_boundary(which: str, request: pytest.FixtureRequest) -> None:
    encoder = request.getfixturevalue(which)
    text = "a<|endoftext|>b <|other|><|endoftext|>\n<tag>"
    tokens, _ = encoder.encode_batch([text, text.encode()])
    assert not {0, 1} & set(tokens.tolist())
    assert 900 in tokens, "an added token that is not special is still a token"
    assert encoder.decode(tokens) == text * 2


@pytest.mark.parametrize("which", ["fast", "reference"])
def test_what_is_not_utf8_becomes_u_fffd_everywhere(which: str, request: pytest.FixtureRequest) -> None:
    encoder = request.getfixturevalue(which)
    for raw, text in (
        ("a\ud800b", "a\ufffdb"),
        ("\udfff\ud83d\ude00", "\ufffd" * 3),
        (b"a\xffb\xc3", "a\ufffdb\ufffd"),
        (b"\xed\xa0\x80", "\ufffd" * 3),
    ):
        assert encoder.decode(encoder.encode_batch([raw])[0]) == text
        assert as_utf8(raw).decode() == as_text(raw) == text
    mixed, _ = encoder.encode_batch(["é\ud800", "é\ufffd".encode(), "é\ufffd"])
    assert np.array_equal(*np.split(mixed, 3)[:2])


@settings(max_examples=150, deadline=None)
@given(
    texts=st.lists(
        st.one_of(
            st.text(st.characters(codec=None), max_size=60),
            st.binary(max_size=40),
            st.lists(st.sampled_from([" ", "  ", "a", "1", "\n", "'S", "é", "<|endoftext|>", "\x00", "漢"])).map(
                "".join
            ),
        ),
        max_size=6,
    )
)
def test_any_text_is_encoded_alike_and_comes_back(
    fast: GigatokenEncoder, reference: HuggingFaceEncoder, texts: list[str | bytes]
) -> None:
    expected, expected_offsets = reference.encode_batch(texts)
    tokens, offsets = fast.encode_batch(texts)
    assert np.array_equal(expected, tokens)
    assert np.array_equal(expected_offsets, offsets)
    assert [fast.decode(tokens[a:b]) for a, b in pairwise(offsets)] == list(map(as_text, texts))


def test_several_threads_may_encode_at_once(fast: GigatokenEncoder) -> None:
    batches = [["".join(TEXTS)[k * 900 :][:4000]] * (1 + 20 * k) for k in range(8)]
    alone = [fast.encode_batch(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(fast.encode_batch, batches * 3))
    for (tokens, offsets), (expected, bounds) in zip(together, alone * 3, strict=True):
        assert np.array_equal(tokens, expected)
        assert np.array_equal(offsets, bounds)


def test_what_the_fast_encoder_remembers_is_let_go(
    tmp_path: Path, reference: HuggingFaceEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_module, "REMADE_BYTES", 10_000)
    encoder = load_encoder(save_tokenizer(tmp_path))
    assert isinstance(encoder, GigatokenEncoder)
    tokenizers = []
    texts = [text[at : at + 1500] for text in TEXTS for at in range(0, len(text), 1500)]
    for text in texts:
        assert encoder.encode(text).tolist() == reference.encode(text).tolist()
        tokenizers.append(encoder.tokenizer)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(encoder.encode, texts))
    assert all((tokens == reference.encode(text)).all() for text, tokens in zip(texts, found, strict=True))
    assert len({id(tokenizer) for tokenizer in tokenizers}) > 1


def test_falls_back_with_one_warning_when_the_fast_encoder_does_not_know_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = save_tokenizer(tmp_path, r"\p{N}|[^\p{N}]+")
    with caplog.at_level(logging.WARNING, "headrace.data"):
        encoder = load_encoder(file)
    assert encoder.name == "tokenizers"
    (record,) = caplog.records
    assert "\n" not in record.getMessage()
    assert str(file) in record.getMessage()


def test_falls_back_when_one_sample_differs(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Wrong(GigatokenEncoder):
        def encode_batch(self, texts: Any) -> Any:
            return super().encode_batch(["other" if text == "peculiar" else text for text in texts])

    monkeypatch.setattr(encoder_module, "GigatokenEncoder", Wrong)
    assert load_encoder(file).name == "gigatoken"
    with caplog.at_level(logging.WARNING, "headrace.data"):
        assert load_encoder(file, samples=["fine", "peculiar"]).name == "tokenizers"
    assert "'peculiar'" in caplog.text


def test_the_check_sees_a_single_wrong_or_missing_token(fast: GigatokenEncoder, reference: HuggingFaceEncoder) -> None:
    class Off:
        def __init__(self, at: int, drop: bool) -> None:
            self.at, self.drop = at, drop

        def encode_batch(self, texts: list[str]) -> Any:
            tokens, offsets = fast.encode_batch(texts)
            if self.drop:
                return np.delete(tokens, self.at), np.where(offsets > self.at, offsets - 1, offsets)
            changed = tokens.copy()
            changed[self.at] += 1
            return changed, offsets

    texts = ["one two three", "four five six"]
    assert first_difference(reference, fast, texts) is None
    for at in (0, 3, len(fast.encode_batch(texts)[0]) - 1):
        for drop in (True, False):
            assert "expected" in (first_difference(reference, Off(at, drop), texts) or "")  # type: ignore[arg-type]


def test_end_of_document_token(tmp_path: Path) -> None:
    file = save_tokenizer(tmp_path, specials=("<pad>", "<s>", "</s>", "<|im_end|>"))
    encoder = load_encoder(tmp_path)
    assert (encoder.eos_id, encoder.bos_id) == (2, 1)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<|im_end|>"}, "bos_token": None})
    )
    assert load_encoder(file).eos_id == 3, "tokenizer_config.json goes first"


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such file or folder; give a tokenizer.json"):
        load_encoder(tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"no tokenizer.json or tokenizer.model in this folder; train one"):
        load_encoder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(ConfigError, match=r"not a Hugging Face tokenizer.json"):
        load_encoder(tmp_path)
    save_tokenizer(tmp_path, specials=("<pad>",))
    with pytest.raises(ConfigError, match="no token ends a document; name it as `eos_token`"):
        load_encoder(tmp_path)


def test_a_boundary_that_is_not_marked_special_is_one_all_the_same(tmp_path: Path) -> None:
    def not_special(fields: dict[str, Any]) -> None:
        for token in fields["added_tokens"]:
            token["special"] = False

    save_tokenizer(tmp_path, change=not_special)
    for fast in (True, False):
        encoder = load_encoder(tmp_path, fast=fast)
        assert encoder.name == ("gigatoken" if fast else "tokenizers")
        tokens, _ = encoder.encode_batch(["a<|endoftext|>b<|other|>"])
        assert encoder.eos_id not in tokens
        assert 1 in tokens, "not a boundary and not special: an ordinary added token"


def test_a_boundary_that_text_can_spell_is_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "Ġ"}))
    with pytest.raises(ConfigError, match=r"the text .* is encoded as the end-of-document token; name an"):
        load_encoder(tmp_path)


def test_sentencepiece_model(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(line for text in TEXTS for line in text.splitlines() if line.strip()))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "tokenizer"), vocab_size=700, model_type="bpe",
        byte_fallback=True,
        split_digits=True, character_coverage=0.999, minloglevel=2, normalization_rule_name="identity",
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, num_threads=1,
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for encoder in (load_encoder(tmp_path), load_encoder(tmp_path / "tokenizer.model", fast=False)):
        assert (encoder.eos_id, encoder.bos_id, encoder.vocab_size) == (2, 1, 700)
        tokens, offsets = encoder.encode_batch(["def f(x):", "    a</s>b 12", "漢字"])
        assert tokens[: offsets[1]].tolist() == processor.encode("def f(x):")
        assert encoder.eos_id not in tokens
        assert encoder.decode(tokens[offsets[1] : offsets[2]]) == "    a</s>b 12"


def test_sentencepiece_without_the_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a")
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    with pytest.raises(ConfigError, match="needs the package sentencepiece; `pip install sentencepiece`"):
        load_encoder(tmp_path)
