"""What parts of the work cost alone, on the same files and texts: no loader can be faster than these in Python today.

`decompress`: read and decompress the `.jsonl.zst` files. `parse`: that, split into lines and parsed. `read_encode`:
that, and encoded document by document, one file after the other; nothing mixed, shuffled, packed or hashed.
`encode`: texts that are in memory already, document by document or in batches (`spec["call"]`).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import zstandard

from data_scheduler.encoder import load_encoder
from loading import corpus
from loading.child import Arm, Spec


def _files(spec: Spec, split: str) -> list[str]:
    files = corpus.files(Path(spec["folder"]), split, 8, "jsonl.zst")
    return [file for name in files for file in files[name]]


def _encoder(spec: Spec, kept: dict[str, Any]) -> Any:
    if "encoder" not in kept:
        kept["encoder"] = load_encoder(Path(spec["folder"]) / "tokenizer")
    return kept["encoder"]


def _lines(file: str) -> bytes:
    return zstandard.ZstdDecompressor().decompress(Path(file).read_bytes())


def _texts(file: str) -> list[str]:
    return [orjson.loads(line)["text"] for line in _lines(file).split(b"\n") if line]


def _share(spec: Spec, split: str) -> int:
    """Tokens of a file, on average: floors that never see tokens count the corpus's."""
    total = spec["corpus_tokens"] if split == "main" else 1
    return int(total / len(_files(spec, split))) + 1


def decompress(spec: Spec, split: str, kept: dict[str, Any]) -> Iterator[int]:
    """Files to bytes."""
    share = _share(spec, split)
    return (share for file in _files(spec, split) if _lines(file))


def parse(spec: Spec, split: str, kept: dict[str, Any]) -> Iterator[int]:
    """Files to texts."""
    share = _share(spec, split)
    return (share for file in _files(spec, split) if _texts(file))


def read_encode(spec: Spec, split: str, kept: dict[str, Any]) -> Iterator[int]:
    """Files to tokens."""
    encode = _encoder(spec, kept).encode
    return (sum(len(encode(text)) + 1 for text in _texts(file)) for file in _files(spec, split))


def encode(spec: Spec, split: str, kept: dict[str, Any]) -> Iterator[int]:
    """Texts in memory to tokens."""
    encoder = _encoder(spec, kept)
    texts = [text for file in _files(spec, split) for text in _texts(file)]
    if spec["call"] == "document":
        one = encoder.encode
        return (len(one(text)) + 1 for text in texts)
    many, size = encoder.encode_batch, 64
    return (len(many(texts[i : i + size])[0]) + size for i in range(0, len(texts), size))


ARMS: dict[str, Arm] = {"decompress": decompress, "parse": parse, "read_encode": read_encode, "encode": encode}
