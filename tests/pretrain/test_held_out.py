"""Held-out losses per byte: the text that the counted tokens stand for, whatever the layout."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from data_scheduler import DataConfig
from data_scheduler.encoder import load_encoder
from pretrain.evaluate import HeldOut


@pytest.fixture
def data(data_config: Callable[..., DataConfig]) -> DataConfig:
    config = data_config(seq_len=32, global_batch_size=8, lanes=8)
    return config.model_copy(
        update={"sources": [s.model_copy(update={"val_paths": s.paths}) for s in config.sources[:2]]}
    )


def test_bits_per_byte_are_of_the_text_of_the_counted_tokens(data: DataConfig) -> None:
    assert data.tokenizer is not None
    encoder = load_encoder(data.tokenizer)
    held_out = HeldOut(data, encoder, count=3, micro_batch_size=1, dp_rank=0, dp_size=1)
    names = [source.name for source in data.sources]
    found = held_out.bits_per_byte(dict.fromkeys(names, 1.0))
    assert list(found) == names
    specials = 0
    for number, name in enumerate(names):
        tokens, text = 0, 0
        for one in (m for m in held_out.microbatches if int(m.source_ids[0]) == number):
            labels = one.labels[0][one.loss_mask[0]].numpy()
            tokens += len(labels)
            specials += int((labels == encoder.eos_id).sum())
            text += sum(len(encoder.decode([i]).encode()) for i in labels.tolist() if i != encoder.eos_id)
        assert found[name] == pytest.approx(tokens / (text * math.log(2)), rel=1e-12)
    assert specials  # their losses count, their bytes do not


def test_every_rank_of_every_layout_has_the_same(data: DataConfig) -> None:
    assert data.tokenizer is not None
    encoder = load_encoder(data.tokenizer)
    alone = HeldOut(data, encoder, 3, 1, 0, 1).bits_per_nat_per_token
    assert alone
    for size in (2, 4):
        for rank in range(size):
            spread = HeldOut(data, encoder, 3, 2, rank, size, multiple=2)  # padded with copies that do not count
            assert spread.bits_per_nat_per_token == alone


def test_weights_take_tokens_and_their_bytes_out(data: DataConfig) -> None:
    assert data.tokenizer is not None
    encoder = load_encoder(data.tokenizer)
    held_out = HeldOut(data, encoder, 3, 1, 0, 1)
    assert held_out.bits_per_byte({"not held out": 1.0}) == {}
    losses = dict.fromkeys(held_out.names, np.float64(2.0))
    assert held_out.bits_per_byte(losses) == {n: 2 * f for n, f in held_out.bits_per_nat_per_token.items()}
