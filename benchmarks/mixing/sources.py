"""Eight sources of unequal difficulty and size, for comparisons of policies.

    code prose headers unicode arithmetic    the corpus of `headrace data sample`
    sums       a + b = c with up to three digits: short, and soon learned but for the carries
    refrain    a line of ten words, said again and again: nothing to learn but to copy
    shuffled   the prose with its words in random order: words can be learned, their order cannot

The generated ones have `MADE_BYTES` of text each, 4 % held out like the rest.
"""

import gzip
import random
from collections.abc import Iterator
from pathlib import Path

import orjson

MADE_BYTES = 600_000
VOCABULARY = 1024
FROM_SAMPLE = ["code", "prose", "headers", "unicode", "arithmetic"]
MADE = ["sums", "refrain", "shuffled"]
NAMES = FROM_SAMPLE + MADE


def write_sources(out: Path) -> None:
    """The corpus under `out`, and a tokenizer of `VOCABULARY` tokens trained on as much of every source."""
    from pretrain.cli import app

    app(["data", "sample", "--out", str(out)], standalone_mode=False)
    prose = [orjson.loads(line)["text"] for file in sorted((out / "prose").glob("train-*")) for line in _lines(file)]
    words = [word for text in prose for word in text.split()]
    for name, documents in (("sums", _sums()), ("refrain", _refrains(words)), ("shuffled", _shuffled(words))):
        _write(out / name, documents)
    train = ["tokenizer", "train", "--vocab-size", str(VOCABULARY), "--max-bytes", "4000000"]
    data = [word for name in NAMES for word in ("--data", str(out / name / "train-*"))]
    app([*train, *data, "--out", str(out / "tokenizer")], standalone_mode=False)


def _lines(file: Path) -> list[bytes]:
    return gzip.decompress(file.read_bytes()).splitlines()


def _write(folder: Path, documents: Iterator[str]) -> None:
    texts, size = [], 0
    while size < MADE_BYTES:
        texts.append(next(documents))
        size += len(texts[-1].encode())
    folder.mkdir(parents=True, exist_ok=True)
    held_out = max(1, len(texts) // 25)
    for split, part in (("val", texts[:held_out]), ("train", texts[held_out:])):
        lines = b"".join(orjson.dumps({"text": text}) + b"\n" for text in part)
        (folder / f"{split}-00000.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))


def _sums() -> Iterator[str]:
    draw = random.Random("sums")
    while True:
        pairs = [
            (draw.randrange(10 ** draw.randint(1, 3)), draw.randrange(10 ** draw.randint(1, 3))) for _ in range(40)
        ]
        yield "".join(f"{a} + {b} = {a + b}\n" for a, b in pairs)


def _refrains(words: list[str]) -> Iterator[str]:
    draw = random.Random("refrain")
    while True:
        yield (" ".join(draw.choices(words, k=10)) + "\n") * 12


def _shuffled(words: list[str]) -> Iterator[str]:
    draw = random.Random("shuffled")
    while True:
        yield " ".join(draw.choices(words, k=150)) + "\n"
