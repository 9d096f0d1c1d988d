from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_scheduler import DataConfig
from data_scheduler.config import SourceConfig
from data_scheduler.encoder import load_encoder
from data_scheduler.lane import DocumentStream, Position
from data_scheduler.manifest import Manifest
from data_scheduler.packing import SplitPacker
from data_scheduler.source import SourceReader
from data_scheduler.unit_cache import UnitCache


@pytest.fixture(scope="module")
def reader(data_config: Callable[..., DataConfig]) -> SourceReader:
    config = data_config(lanes=4)
    source: SourceConfig = config.sources[0]
    return SourceReader(source, Manifest.take(source), config, load_encoder(config.tokenizer), UnitCache())


def one_epoch(reader: SourceReader, lane: int) -> list[list[int]]:
    """The lane's documents of epoch 0 in order, each as token ids with the end-of-document token: the plain way."""
    documents = []
    for chunk in reader.hand(0, lane).tolist():
        for text in reader.documents(chunk, 0)[0]:
            tokens, _ = reader.encoder.encode_batch([text])
            documents.append([*tokens.tolist(), reader.encoder.eos_id])
    return documents


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 3), st.integers(2, 300))
def test_split_uses_every_token_once_and_marks_every_document(reader: SourceReader, lane: int, length: int) -> None:
    documents = one_epoch(reader, lane)
    flat = [token for document in documents for token in document]
    begins = np.cumsum([0, *map(len, documents)])
    stream = DocumentStream(reader, lane, Position())
    row = np.empty(length, dtype=np.int64)
    for number in range(len(flat) // length):
        at = number * length
        segments = SplitPacker().pack(stream, row)
        assert row.tolist() == flat[at : at + length]
        inside = begins[(begins > at) & (begins < at + length)] - at
        assert segments.starts.tolist() == [0, *inside.tolist()]
        assert segments.offset == at - begins[begins <= at][-1]
        assert len(segments.document_ids) == len(segments.starts)


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 200), st.integers(0, 40))
def test_a_stream_opened_at_a_position_continues_exactly(reader: SourceReader, length: int, skip: int) -> None:
    packer = SplitPacker()
    stream = DocumentStream(reader, 1, Position())
    row, other = np.empty(length, dtype=np.int64), np.empty(length, dtype=np.int64)
    for _ in range(skip):
        packer.pack(stream, row)
    again = DocumentStream(reader, 1, stream.position)
    for _ in range(5):
        left, right = packer.pack(stream, row), packer.pack(again, other)
        assert (row == other).all()
        assert (left.starts == right.starts).all()
        assert (left.document_ids == right.document_ids).all()
        assert left.offset == right.offset
        assert stream.position == again.position
