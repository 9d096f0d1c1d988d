"""A small corpus in four formats and a byte-level tokenizer for it, made once per test session."""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_scheduler import DataConfig

WORDS = [
    "water",
    "wheel",
    "mill",
    "race",
    "sluice",
    "gate",
    "weir",
    "river",
    "stream",
    "grain",
    "stone",
    "gear",
    "belt",
]


def make_documents(name: str, count: int, seed: int) -> list[str]:
    """Documents of very different lengths that each name themselves, so that a document is known by its text."""
    rng = random.Random(f"{name}-{seed}")
    lengths = [min(400, int(rng.paretovariate(1.1) * 3)) for _ in range(count)]
    return [f"{name}-{i} " + " ".join(rng.choices(WORDS, k=length)) for i, length in enumerate(lengths)]


def jsonl(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources a (.jsonl), b (.jsonl.zst), c (.jsonl.gz), d (.parquet) under one folder, and tokenizer.json."""
    root = tmp_path_factory.mktemp("corpus")
    for name in "abcd":
        (root / name).mkdir()
    (root / "a" / "0.jsonl").write_bytes(jsonl(make_documents("a", 300, 0)))
    for shard in range(3):
        texts = make_documents("b", 60, shard)
        (root / "b" / f"{shard}.jsonl.zst").write_bytes(zstandard.compress(jsonl(texts)))
        (root / "c" / f"{shard}.jsonl.gz").write_bytes(gzip.compress(jsonl(make_documents("c", 50, shard)), mtime=0))
    pq.write_table(pa.table({"text": make_documents("d", 200, 0)}), root / "d" / "0.parquet", row_group_size=30)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(make_documents("t", 100, 0), trainer)
    tokenizer.save(str(root / "tokenizer.json"))
    return root


@pytest.fixture(scope="session")
def data_config(corpus: Path) -> Callable[..., DataConfig]:
    """Makes a DataConfig of the corpus; keyword arguments override."""

    def make(**changes: Any) -> DataConfig:
        sources = [
            {"name": name, "paths": [str(corpus / name)], "weight": weight}
            for name, weight in zip("abcd", (0.4, 0.3, 0.2, 0.1), strict=True)
        ]
        config: dict[str, Any] = {
            "tokenizer": str(corpus / "tokenizer.json"),
            "sources": sources,
            "seq_len": 64,
            "global_batch_size": 24,
            "lanes": 24,
            "chunk_bytes": 8192,
            "prefetch": 0,
        }
        return DataConfig.model_validate(config | changes)

    return make
