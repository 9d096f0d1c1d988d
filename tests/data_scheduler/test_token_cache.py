"""The token cache changes nothing but speed: same stream, same rejects, whatever happens to its folder."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_corpus import jsonl, make_documents

from data_scheduler import DataConfig, Scheduler
from data_scheduler.encoder import load_encoder

Make = Callable[..., DataConfig]
STEPS = 40


class CountingEncoder:
    """The encoder, counting the texts it encodes."""

    def __init__(self, path: str) -> None:
        self._encoder = load_encoder(path)
        self.texts = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def encode(self, text: Any) -> Any:
        self.texts += 1
        return self._encoder.encode(text)


def go(config: DataConfig, steps: int = STEPS) -> tuple[list[list[bytes]], list[Any], int]:
    """(digests per step, rejects, texts encoded)."""
    encoder = CountingEncoder(config.tokenizer)
    scheduler = Scheduler(config, encoder=encoder)  # type: ignore[arg-type]
    batches = [next(scheduler) for _ in range(steps)]
    return [batch.digests for batch in batches], [reject for b in batches for reject in b.rejects], encoder.texts


def cached_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.tok"))


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_a_warm_cache_gives_the_same_stream_without_encoding(data_config: Make, tmp_path: Path, packing: str) -> None:
    expected, _, texts = go(data_config(packing=packing))
    assert texts > 500
    config = data_config(packing=packing, token_cache=str(tmp_path))
    cold, _, _ = go(config)
    warm, _, again = go(config)
    assert cold == warm == expected
    assert again == 0


def test_rejects_are_told_from_the_cache_too(data_config: Make, tmp_path: Path) -> None:
    lines = jsonl(make_documents("x", 300, 0)).splitlines(keepends=True)
    lines[10:10] = [b"{broken\n"]
    lines[200:200] = [b'{"no": "text"}\n']
    (tmp_path / "x.jsonl").write_bytes(b"".join(lines))
    source = {"name": "x", "paths": [str(tmp_path / "x.jsonl")], "max_reject_fraction": 0.5}
    config = data_config(sources=[source], token_cache=str(tmp_path / "cache"))
    _, cold, _ = go(config)
    _, warm, texts = go(config)
    assert texts == 0
    assert warm == cold
    assert {reject.reason.split(":")[0] for reject in warm} == {"not valid JSON", "field 'text' is missing"}


def test_a_changed_file_is_encoded_again(data_config: Make, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(jsonl(make_documents("x", 300, 0)))
    config = data_config(sources=[{"name": "x", "paths": [str(path)]}], token_cache=str(tmp_path / "cache"))
    go(config)
    path.write_bytes(jsonl(make_documents("x", 300, 1)))
    expected, _, _ = go(config.model_copy(update={"token_cache": None}))
    changed, _, texts = go(config)
    assert changed == expected
    assert texts > 100


def test_damage_is_noticed_and_mended(data_config: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = data_config(token_cache=str(tmp_path))
    expected, _, _ = go(config)
    files = cached_files(tmp_path)
    for number, path in enumerate(files):
        data = bytearray(path.read_bytes())
        if number % 3 == 0:
            data[-1] ^= 1
        elif number % 3 == 1:
            del data[len(data) // 2 :]
        else:
            data[6] ^= 0xFF
        path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert go(config)[0] == expected
    assert sum("damaged" in record.getMessage() for record in caplog.records) >= len(files) // 2
    assert go(config)[2] == 0


def test_a_folder_that_cannot_be_written_is_one_warning(
    data_config: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected, _, _ = go(data_config())
    (tmp_path / "file").write_text("not a folder")
    with caplog.at_level(logging.WARNING):
        assert go(data_config(token_cache=str(tmp_path / "file")))[0] == expected
    told = [record.getMessage() for record in caplog.records if "token cache" in record.getMessage()]
    assert len([line for line in told if "going on without" in line]) <= 4  # one a source


def test_marked_text_and_tokens_are_left_alone(data_config: Make, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(jsonl(make_documents("x", 300, 0)))
    source = {"name": "x", "paths": [str(path)], "prompt": "{text}"}
    go(data_config(sources=[source], token_cache=str(tmp_path / "cache")), steps=3)
    assert not cached_files(tmp_path / "cache")
