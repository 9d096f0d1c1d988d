"""The tokenizer's files in a model folder, so that `AutoTokenizer.from_pretrained` gives the ids the run trained on."""

import json
import shutil
from pathlib import Path
from typing import Any

from data_scheduler.encoder import Encoder, HuggingFaceEncoder, load_encoder
from headrace.errors import ConfigError

BESIDE = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


def load_tokenizer(path: Path, vocab_size: int) -> Encoder:
    """The reference encoder of `path`; raises ConfigError when it has more tokens than the model."""
    encoder = load_encoder(path, fast=False)
    if encoder.vocab_size > vocab_size:
        raise ConfigError(f"tokenizer {path}: has {encoder.vocab_size} tokens, the model only {vocab_size}")
    return encoder


def copy_tokenizer(path: Path, encoder: Encoder, out: Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and what belongs to them into `out`. Raises ConfigError."""
    if not isinstance(encoder, HuggingFaceEncoder):
        raise ConfigError(
            f"tokenizer {path}: a SentencePiece model; convert it to a tokenizer.json with transformers and name that "
            "with --tokenizer"
        )
    file = path / "tokenizer.json" if path.is_dir() else path
    shutil.copyfile(file, out / "tokenizer.json")
    for name in BESIDE:
        if (file.parent / name).is_file():
            shutil.copyfile(file.parent / name, out / name)
    beside = file.parent / "tokenizer_config.json"
    try:
        config: dict[str, Any] = json.loads(beside.read_text("utf-8")) if beside.is_file() else {}
    except ValueError:
        raise ConfigError(f"{beside}: not valid JSON") from None
    config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    config.setdefault("clean_up_tokenization_spaces", False)
    config.setdefault("eos_token", encoder.tokenizer.id_to_token(encoder.eos_id))
    if encoder.bos_id is not None:
        config.setdefault("bos_token", encoder.tokenizer.id_to_token(encoder.bos_id))
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
