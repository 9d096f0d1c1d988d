"""Decompression that keeps what can be decoded and says what is wrong with the rest."""

import bz2
import lzma
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import zstandard

READ_BYTES = 1 << 20


class Codec(NamedTuple):
    """A compressed format whose files are one or more streams, one after the other."""

    name: str
    stream: Callable[[], Any]
    """Makes a decompressor with `decompress`, `eof` and `unused_data`."""
    errors: type[Exception] | tuple[type[Exception], ...]


CODECS = {
    ".gz": Codec("gzip", lambda: zlib.decompressobj(wbits=31), zlib.error),
    ".zst": Codec("zstd", lambda: zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError),
    ".bz2": Codec("bzip2", bz2.BZ2Decompressor, OSError),
    ".xz": Codec("xz", lzma.LZMADecompressor, lzma.LZMAError),
}


def decompress(data: bytes, codec: Codec) -> tuple[bytes, str | None]:
    """All of `data` that can be decoded, and what is wrong with the rest (None: nothing)."""
    pieces: list[bytes] = []
    rest = data
    while rest:
        stream = codec.stream()
        view = memoryview(rest)
        try:
            for at in range(0, len(view), READ_BYTES):
                pieces.append(stream.decompress(view[at : at + READ_BYTES]))
                if stream.eof:
                    # Padding with zeros between streams is legal (tar and dd leave it).
                    rest = (stream.unused_data + bytes(view[at + READ_BYTES :])).lstrip(b"\0")
                    break
            else:
                return b"".join(pieces), f"truncated {codec.name} stream; the records up to it were read"
        except codec.errors as error:
            return b"".join(pieces), f"damaged {codec.name} stream ({error}); the records up to it were read"
    return b"".join(pieces), None
