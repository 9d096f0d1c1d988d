"""Decompression piece by piece: what can be decoded is kept, what is wrong with the rest is said.

Memory stays bounded whatever the input claims: pieces are at most OUTPUT_BYTES (for zstd at most 32,768 times
FEED_BYTES, 128 MiB), dictionaries at most 256 MiB, and a file that expands more than MOST_EXPANSION times is given up.
"""

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

import zstandard

FEED_BYTES = 4 << 10
"""Compressed bytes decoded at a time: zstd cannot be told where to stop, and expands at most 32,768 times."""
OUTPUT_BYTES = 1 << 20
DICTIONARY_BYTES = 256 << 20
"""Memory an .xz file may ask for; the highest preset needs 65 MB."""
MOST_EXPANSION = 250
"""Text compresses 3 to 20 times, logs 100; gzip's bombs expand 1,032 times, bzip2's and zstd's far more."""
BOMB_BYTES = 64 << 20
"""Decoded bytes from which the expansion is looked at."""


class Damage(Exception):
    """What is wrong with a stream, after everything before it was given."""


class Codec(NamedTuple):
    """A compressed format whose files are one or more streams, one after the other."""

    name: str
    stream: Callable[[], Any]
    """Makes a decompressor with `decompress(data, limit)`, `needs_input`, `eof` and `unused_data`."""
    errors: tuple[type[Exception], ...]


class _Gzip:
    """zlib's decompressor with the interface of bz2's and lzma's."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(wbits=31)

    def decompress(self, data: bytes, limit: int) -> bytes:
        return self._stream.decompress(self._stream.unconsumed_tail + data, limit)

    @property
    def needs_input(self) -> bool:
        return not self._stream.unconsumed_tail

    @property
    def eof(self) -> bool:
        return self._stream.eof

    @property
    def unused_data(self) -> bytes:
        return self._stream.unused_data


class _Zstd:
    """zstandard's decompressor with the interface of bz2's and lzma's, except that it knows no limit."""

    needs_input = True

    def __init__(self) -> None:
        self._stream = zstandard.ZstdDecompressor().decompressobj()

    def decompress(self, data: bytes, limit: int) -> bytes:
        return bytes(self._stream.decompress(data))

    @property
    def eof(self) -> bool:
        return bool(self._stream.eof)

    @property
    def unused_data(self) -> bytes:
        return bytes(self._stream.unused_data)


CODECS = {
    ".gz": Codec("gzip", _Gzip, (zlib.error,)),
    ".zst": Codec("zstd", _Zstd, (zstandard.ZstdError,)),
    ".bz2": Codec("bzip2", bz2.BZ2Decompressor, (OSError, ValueError)),
    ".xz": Codec("xz", lambda: lzma.LZMADecompressor(memlimit=DICTIONARY_BYTES), (lzma.LZMAError, MemoryError)),
}


def decoded(file: IO[bytes], codec: Codec) -> Iterator[bytes]:
    """The file's decoded bytes in pieces. Raises Damage at the first byte that cannot be decoded, OSError as `file`."""
    fed = given = 0
    stream: Any = None
    while data := file.read(FEED_BYTES):
        fed += len(data)
        while data or (stream is not None and not stream.needs_input):
            if stream is None:
                # Padding with zeros between streams is legal (tar and dd leave it).
                data = data.lstrip(b"\0") if given else data
                if not data:
                    break
                stream = codec.stream()
            try:
                piece = stream.decompress(data, OUTPUT_BYTES)
            except codec.errors as error:
                raise Damage(f"damaged {codec.name} stream ({error}); the records up to it were read") from None
            data = b""
            if stream.eof:
                data, stream = stream.unused_data, None
            given += len(piece)
            if given > BOMB_BYTES and given > MOST_EXPANSION * fed:
                raise Damage(
                    f"the {codec.name} stream expands more than {MOST_EXPANSION} times, which text does not; the "
                    "records up to there were read"
                )
            if piece:
                yield piece
    if stream is not None:
        raise Damage(f"truncated {codec.name} stream; the records up to it were read")


def decompress(file: IO[bytes], codec: Codec | None, limit: int | None = None) -> tuple[bytes, str | None]:
    """All of `file` that can be decoded, and what is wrong with the rest (None: nothing); at most `limit` bytes and a
    piece. Without a codec the file's own bytes."""
    if codec is None:
        return file.read() if limit is None else file.read(limit + 1), None
    pieces: list[bytes] = []
    size = 0
    try:
        for piece in decoded(file, codec):
            pieces.append(piece)
            size += len(piece)
            if limit is not None and size > limit:
                break
    except Damage as damage:
        return b"".join(pieces), str(damage)
    return b"".join(pieces), None
