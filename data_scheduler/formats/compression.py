"""Decompression that keeps what can be decoded and says what is wrong with the rest."""

import bz2
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

import zstandard

READ_BYTES = 1 << 20
FEED_BYTES = 1 << 16
"""What a decompressor is given at a time. Larger pieces make larger outputs, and those are slower: 1,200 MB of text per
CPU-second with 64 KB, 540 with 1 MB (zstd level 3)."""


class Codec(NamedTuple):
    """A compressed format whose files are one or more streams, one after the other."""

    name: str
    stream: Callable[[], Any]
    """Makes a decompressor with `decompress`, `eof` and `unused_data`."""
    errors: type[Exception] | tuple[type[Exception], ...]


CODECS = {
    ".gz": Codec("gzip", lambda: zlib.decompressobj(wbits=31), zlib.error),
    ".zst": Codec(
        "zstd", lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(), zstandard.ZstdError
    ),
    ".bz2": Codec("bzip2", bz2.BZ2Decompressor, OSError),
    ".xz": Codec("xz", lzma.LZMADecompressor, lzma.LZMAError),
}


class TextStream:
    """The decompressed bytes of a file, piece by piece, in memory for one piece.

    Ends where the file ends or its damage begins; then `problem` says what is wrong with the rest (None: nothing).
    """

    def __init__(self, file: IO[bytes], codec: Codec) -> None:
        self.problem: str | None = None
        self._file, self._codec = file, codec

    def __iter__(self) -> Iterator[bytes]:
        """Raises OSError when the file itself cannot be read."""
        name, stream, rest, begun = self._codec.name, None, b"", False
        while data := rest or self._file.read(FEED_BYTES):
            rest = b""
            if stream is None:
                # Padding with zeros between streams is legal (tar and dd leave it).
                data = data.lstrip(b"\0") if begun else data
                if not data:
                    continue
                stream, begun = self._codec.stream(), True
            try:
                piece = stream.decompress(data)
            except self._codec.errors as error:
                self.problem = f"damaged {name} stream ({error}); the records up to it were read"
                return
            if piece:
                yield piece
            if stream.eof:
                rest, stream = stream.unused_data, None
        if stream is not None:
            self.problem = f"truncated {name} stream; the records up to it were read"


def decompress(data: bytes, codec: Codec) -> tuple[bytes, str | None]:
    """All of `data` that can be decoded, and what is wrong with the rest (None: nothing)."""
    stream = TextStream(io.BytesIO(data), codec)
    return b"".join(stream), stream.problem
