"""An optional write-through cache of tokens: what was encoded once is read back in later epochs and runs.

One file per chunk, in `<folder>/<tokenizer>/<ab>/<key>.tok`. The key is the chunk's file as it is now (path, size,
time, a checksum of its ends), how it is cut and read, and the tokenizer, so nothing in the cache can go stale: a
changed file, setting or tokenizer asks for another name. Any number of runs, ranks and nodes may share a folder.

    length of header · header (JSON) · places int32[documents] · lengths int32[documents] · tokens

Two bytes a token for vocabularies up to 65,536, else four; English text is about 4.5 bytes a token.
"""

import hashlib
import logging
import os
import tempfile
import zlib
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import orjson

from data_scheduler.order import Int64
from data_scheduler.sequences import AnyTokens

log = logging.getLogger("headrace.data")

VERSION = 1


class CachedChunk(NamedTuple):
    """A chunk's documents as tokens, and what reading it had to say."""

    places: Int64
    """int64[documents]: place of each document among the chunk's records."""
    documents: list[AnyTokens]
    """Tokens of each document, without boundary tokens."""
    read: int
    """Records there were, but for those that a filter left out."""
    rejected: list[tuple[str, str]]
    """(where, reason) of each rejected record."""


class TokenCache:
    """The cached chunks of one tokenizer."""

    def __init__(self, folder: str, fingerprint: str, token_dtype: Any) -> None:
        self._folder = os.path.join(os.path.expanduser(folder), fingerprint[:32])
        self._dtype = np.dtype(token_dtype).newbyteorder("<")
        self._verified: set[str] = set()
        self._writable = True

    def load(self, key: str) -> CachedChunk | None:
        """The chunk, or None when it is not there or damaged (then one warning says so, and it will be made again)."""
        path = self._path(key)
        try:
            with open(path, "rb") as file:
                data = file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("token cache %s: %s; reading the text instead", path, error.strerror)
            return None
        try:
            return self._parse(data, key)
        except (ValueError, KeyError, TypeError) as error:
            log.warning("token cache %s: damaged (%s); made again from the text", path, error)
            return None

    def store(self, key: str, chunk: CachedChunk) -> None:
        """Keep a chunk. What cannot be written is not kept: one warning says why, and the run goes on without."""
        if not self._writable:
            return
        numbers = np.concatenate([chunk.places, [len(tokens) for tokens in chunk.documents]]).astype("<i4").tobytes()
        body = numbers + b"".join(tokens.astype(self._dtype).tobytes() for tokens in chunk.documents)
        header = orjson.dumps(
            {
                "version": VERSION,
                "key": key,
                "documents": len(chunk.documents),
                "read": chunk.read,
                "rejected": chunk.rejected,
                "crc": zlib.crc32(body),
            }
        )
        path = self._path(key)
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=os.path.dirname(path), prefix=".", delete=False) as file:
                try:
                    file.write(len(header).to_bytes(4, "little") + header + body)
                    file.close()
                    os.replace(file.name, path)  # the first and the last writer write the same
                except BaseException:
                    os.unlink(file.name)
                    raise
        except OSError as error:
            self._writable = False
            log.warning("token cache %s: cannot be written (%s); going on without", self._folder, error.strerror)

    def _parse(self, data: bytes, key: str) -> CachedChunk:
        size = int.from_bytes(data[:4], "little")
        header = orjson.loads(data[4 : 4 + size])
        body = memoryview(data)[4 + size :]
        count = header["documents"]
        if header["version"] != VERSION or header["key"] != key:
            raise ValueError("it holds something else")
        # A checksum costs a fifth of what reading does, so each file is checked once, not once an epoch.
        if key not in self._verified and zlib.crc32(body) != header["crc"]:
            raise ValueError("checksum does not match")
        self._verified.add(key)
        numbers = np.frombuffer(body, "<i4", 2 * count)
        ends = list(accumulate(numbers[count:].tolist(), initial=0))
        tokens = np.frombuffer(body, self._dtype, ends[-1], 8 * count)
        documents = [tokens[begin:end] for begin, end in pairwise(ends)]
        rejected = [(where, reason) for where, reason in header["rejected"]]
        return CachedChunk(numbers[:count].astype(np.int64), documents, header["read"], rejected)

    def _path(self, key: str) -> str:
        name = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        return f"{self._folder}/{name[:2]}/{name}.tok"
