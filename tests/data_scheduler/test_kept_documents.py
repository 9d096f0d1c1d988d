"""Keeping small sources in memory changes nothing but how often they are read and encoded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_corpus import jsonl, make_documents

from data_scheduler import DataConfig, Scheduler, kept_documents
from data_scheduler.encoder import load_encoder
from data_scheduler.kept_documents import ARRAY_BYTES, Budget, KeptChunk, KeptDocuments

Make = Callable[..., DataConfig]


class CountingEncoder:
    """The encoder, with every text it was given."""

    def __init__(self, path: str) -> None:
        self._encoder = load_encoder(path)
        self.texts: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def encode(self, text: Any) -> Any:
        self.texts.append(text)
        return self._encoder.encode(text)


def go(config: DataConfig, steps: int = 60) -> tuple[list[list[bytes]], list[Any], list[str]]:
    """(digests per step, rejects, texts encoded)."""
    encoder = CountingEncoder(config.tokenizer)
    scheduler = Scheduler(config, encoder=encoder)  # type: ignore[arg-type]
    batches = [next(scheduler) for _ in range(steps)]
    scheduler.close()
    return [batch.digests for batch in batches], [reject for b in batches for reject in b.rejects], encoder.texts


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_every_document_is_encoded_once(data_config: Make, monkeypatch: pytest.MonkeyPatch, packing: str) -> None:
    kept, _, texts = go(data_config(packing=packing))
    monkeypatch.setattr(kept_documents, "KEPT_BYTES", 0)
    expected, _, again = go(data_config(packing=packing))
    assert kept == expected
    assert sorted(texts) == sorted(set(again))
    assert len(again) > 1.5 * len(texts)


def test_a_budget_that_is_used_up_costs_only_time(data_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources that turn out to have more tokens than expected are read again from then on."""
    expected, _, texts = go(data_config())
    monkeypatch.setattr(kept_documents, "TEXT_PER_TOKEN", 1 << 40)
    monkeypatch.setattr(kept_documents, "KEPT_BYTES", 20_000)
    found, _, again = go(data_config())
    assert found == expected
    assert len(again) > len(texts)


def test_rejects_are_told_every_time(data_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = jsonl(make_documents("x", 300, 0)).splitlines(keepends=True)
    lines[10:10] = [b"{broken\n"]
    (tmp_path / "x.jsonl").write_bytes(b"".join(lines))
    source = {"name": "x", "paths": [str(tmp_path / "x.jsonl")], "max_reject_fraction": 0.5}
    _, kept, _ = go(data_config(sources=[source]))
    monkeypatch.setattr(kept_documents, "KEPT_BYTES", 0)
    _, expected, _ = go(data_config(sources=[source]))
    assert kept == expected
    assert len(kept) > 3


def test_marked_text_stays_marked(data_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.jsonl").write_bytes(jsonl(make_documents("x", 300, 0)))
    source = {"name": "x", "paths": [str(tmp_path / "x.jsonl")], "prompt": "Again: {text} ", "loss_weight": 0.5}
    kept, _, _ = go(data_config(sources=[source]))
    monkeypatch.setattr(kept_documents, "KEPT_BYTES", 0)
    expected, _, _ = go(data_config(sources=[source]))
    assert kept == expected


def test_what_is_kept_is_counted_and_given_back() -> None:
    budget = Budget(1000 + 3 * ARRAY_BYTES)
    one, other = KeptDocuments(budget), KeptDocuments(budget)
    chunk = KeptChunk(["text", None, np.zeros(100, np.uint16)], np.array([0, 2]), 3, [])
    one.put(7, chunk)
    assert budget.left == 800 + 2 * ARRAY_BYTES
    one.encoded(chunk, 0, np.zeros(300, np.uint16))
    assert budget.left == 200 + ARRAY_BYTES
    assert one.get(7) is chunk
    assert one.get(8) is None
    large = KeptChunk(["text"], np.array([0]), 1, [])
    other.put(7, large)
    other.encoded(large, 0, np.zeros(101, np.uint16))
    assert other.get(7) is None
    assert large.documents[0] is not None  # whoever has the chunk open still needs it
    assert budget.left == 200 + ARRAY_BYTES
    other.put(7, large)
    assert other.get(7) is None
