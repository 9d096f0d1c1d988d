"""Bytes of tokens: of every tokenizer's kind they add up to the text, wherever it is cut."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from data_scheduler.encoder import load_encoder
from data_scheduler.token_bytes import ByteCounter

TEXT = "def f(x):\n    return 'naïve — 東京 🚂'  # <s>"


def byte_level(folder: Path) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT, "return the naïve train"], trainer)
    tokenizer.add_tokens([AddedToken("    ", special=False, normalized=False)])  # not of the byte alphabet
    return saved(tokenizer, folder)


def byte_fallback(folder: Path) -> Path:
    """As Llama 2's: a space before every text, written ▁, and bytes for characters that the vocabulary lacks."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz():#", "▁d"]
    merges = [("▁", "d")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return saved(tokenizer, folder)


def characters(folder: Path) -> Path:
    vocab = {"<unk>": 0} | {c: i + 1 for i, c in enumerate(sorted(set(TEXT)))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    return saved(tokenizer, folder)


def saved(tokenizer: Tokenizer, folder: Path) -> Path:
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("<|endoftext|>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("kind", [byte_level, byte_fallback, characters])
def test_bytes_add_up_to_the_text(kind, tmp_path: Path) -> None:
    encoder = load_encoder(kind(tmp_path), fast=False)
    counter = ByteCounter(encoder)
    text = encoder.encode(TEXT).astype(np.int64)
    assert encoder.decode(text) == TEXT
    whole = np.array([encoder.bos_id, *text, encoder.eos_id], np.int64)
    everything = np.ones(len(whole), np.bool_)
    assert counter.count(whole, everything) == len(TEXT.encode())
    # Any cut between two tokens, in the middle of a character too: nothing is lost, nothing counted twice.
    for cut in range(len(whole) + 1):
        before = np.arange(len(whole)) < cut
        assert counter.count(whole, before) + counter.count(whole, ~before) == len(TEXT.encode())
    ends = np.isin(whole, [encoder.bos_id, encoder.eos_id])
    assert counter.count(whole, ends) == 0
