"""Difficulty scores: columns that a source's `where` can filter on and a curriculum can rank by."""

import zlib
from collections.abc import Iterator
from typing import Any

import zstandard
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.batching import batched

from data_scheduler.encoder import Encoder, load_encoder

BATCH = 256
"""Documents encoded in one call."""


class Length(PipelineStep):
    """Adds `chars`."""

    type = "score"
    name = "length"

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for document in data:
            document.metadata["chars"] = len(document.text)
            yield document


class Compression(PipelineStep):
    """Adds `compression_ratio`: bytes after compression per byte of UTF-8 text; a short text can exceed 1."""

    type = "score"
    name = "compression"

    def __init__(self, codec: str) -> None:
        super().__init__()
        self.codec = codec

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        compress = zlib.compress if self.codec == "zlib" else zstandard.ZstdCompressor(level=3).compress
        for document in data:
            text = document.text.encode()
            document.metadata["compression_ratio"] = len(compress(text)) / len(text)
            yield document


class Tokens(PipelineStep):
    """Adds `tokens`, counted by the encoder that training uses."""

    type = "score"
    name = "tokens"

    def __init__(self, tokenizer: str) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        encoder: Encoder = load_encoder(self.tokenizer)
        for batch in batched(data, BATCH):
            _, offsets = encoder.encode_batch([document.text for document in batch])
            for document, count in zip(batch, (offsets[1:] - offsets[:-1]).tolist(), strict=True):
                document.metadata["tokens"] = count
                yield document
