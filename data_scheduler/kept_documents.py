"""Documents of small sources, kept in memory as the tokens they were encoded to.

Lanes of a small source are epochs apart and each of its chunks is open in several of them, so it would be read and
encoded many times over: with 240 lanes and 200 MB of text 1.4 times within the first epoch.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from data_scheduler.formats.records import Document
from data_scheduler.order import Int64
from data_scheduler.sequences import AnyTokens

if TYPE_CHECKING:
    from data_scheduler.source import SourceReader

KEPT_BYTES = 128 << 20
"""Memory for the tokens of all sources that are kept."""
TEXT_PER_TOKEN = 4
"""Bytes of text behind a token, by which it is judged beforehand which sources fit; English and code have 4 to 4.7."""
ARRAY_BYTES = 128
"""Memory an array takes besides its numbers."""


class KeptChunk(NamedTuple):
    """A chunk that was read, and what reading it had to say."""

    documents: list[Document | None]
    """By their place among the chunk's records; each becomes its tokens when it is first encoded."""
    places: Int64
    """int64[documents]: the places of the good ones."""
    read: int
    """Records there were, but for those that a filter left out."""
    rejected: list[tuple[str, str]]
    """(where, reason) of each rejected record."""


class Budget:
    """Memory that several sources share."""

    def __init__(self, size: int) -> None:
        self.left = size


class KeptDocuments:
    """The chunks of one source that were read so far. Once the budget is used up there are none any more."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._held = 0
        self._chunks: dict[int, KeptChunk] | None = {}

    def get(self, chunk: int) -> KeptChunk | None:
        """The chunk, or None when it must be read."""
        return None if self._chunks is None else self._chunks.get(chunk)

    def put(self, number: int, chunk: KeptChunk) -> None:
        """Keep a chunk that was read."""
        if self._chunks is not None:
            self._chunks[number] = chunk
            self._count(sum(d.nbytes + ARRAY_BYTES for d in chunk.documents if isinstance(d, np.ndarray)))

    def encoded(self, chunk: KeptChunk, place: int, tokens: AnyTokens) -> None:
        """Put `tokens` in the place of the text they are of."""
        chunk.documents[place] = tokens
        if self._chunks is not None:
            self._count(tokens.nbytes + ARRAY_BYTES)

    def _count(self, size: int) -> None:
        self._held += size
        self._budget.left -= size
        if self._budget.left < 0:  # there were more tokens than expected
            self.forget()

    def forget(self) -> None:
        """Keep nothing from here on; chunks that are open stay as they are."""
        self._chunks = None
        self._budget.left += self._held
        self._held = 0


def keep_small_sources(readers: Sequence["SourceReader"]) -> None:
    """Let readers keep the documents of their sources, the smallest first, as many as fit in KEPT_BYTES.

    Not of sources whose text is marked or transformed: those would be kept as text.
    """
    budget, expected = Budget(KEPT_BYTES), 0
    for reader in sorted(readers, key=lambda reader: reader.text_bytes):
        if not reader.gives_plain_tokens:
            continue
        expected += reader.text_bytes // TEXT_PER_TOKEN * np.dtype(reader.token_dtype).itemsize
        reader.kept = KeptDocuments(budget) if expected <= KEPT_BYTES else None
