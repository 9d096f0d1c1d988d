"""A run or a Hugging Face folder as a model of transformers in memory, for what needs a model that answers.

loaded = load(Path("runs/quickstart"))     # or a folder with a config.json
loaded.model(loaded.prompt("def read("))   # transformers' own output
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_scheduler.encoder import Encoder
from headrace.errors import CheckpointError, ConfigError
from pretrain.convert.architecture import from_hf_config, hf_family, to_hf_config
from pretrain.convert.from_hf import read_hf_config, tokenizer_of
from pretrain.convert.native import NativeReader
from pretrain.convert.safetensors_folder import SafetensorsReader
from pretrain.convert.stored_model import find_model
from pretrain.convert.tensors import native_tensors, take
from pretrain.convert.tokenizer_files import load_tokenizer

NOT_PASSED_ON = ("auto_map", "model_type", "attn_implementation", "experts_implementation")
"""Keys of config.json that transformers must not see, besides its private ones (`_attn_implementation`): they may name
code to run, a kernel of the hub among it."""


@dataclass(frozen=True)
class Loaded:
    """A model of transformers, its tokenizer, and how documents begin for it."""

    model: Any
    encoder: Encoder
    starts_with_bos: bool

    def prompt(self, text: str) -> torch.Tensor:
        """int64[1, n], n at least 1: what the model reads before it writes; an empty text is a new document."""
        ids = [int(token) for token in self.encoder.encode(text)]
        if self.starts_with_bos and self.encoder.bos_id is not None:
            ids = [self.encoder.bos_id, *ids]
        return torch.tensor([ids or [self.encoder.eos_id]])


def is_hf_folder(path: Path) -> bool:
    """Whether `path` is a Hugging Face folder rather than a run."""
    return (path / "config.json").is_file()


def load(
    path: Path, step: int | None = None, tokenizer: Path | None = None, dtype: torch.dtype | None = None
) -> Loaded:
    """The model in `path`, in its own type or in `dtype`. Raises CheckpointError or ConfigError."""
    if not is_hf_folder(path):
        return _from_run(path, step, tokenizer, dtype)
    if step is not None:
        raise ConfigError(f"--step: {path} is a model folder, which has no steps")
    return _from_folder(path, tokenizer, dtype)


def _from_run(path: Path, step: int | None, tokenizer: Path | None, dtype: torch.dtype | None) -> Loaded:
    stored = find_model(path, step)
    hf_family(stored.model)
    encoder = load_tokenizer(stored.tokenizer(tokenizer), stored.vocab_size)
    natives = list(native_tensors(stored.model, stored.vocab_size))
    reader = NativeReader(stored.checkpoint, natives)
    config = to_hf_config(stored.model, stored.vocab_size, stored.seq_len, reader.dtype, encoder)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for native in natives:
            whole = reader.read(native)
            for part in native.parts:
                yield part.name, take(whole, part)

    starts_with_bos = stored.meta["config"]["data"].get("document_start", "none") == "bos"
    return Loaded(_build(config, tensors(), dtype or reader.dtype), encoder, starts_with_bos)


def _from_folder(path: Path, tokenizer: Path | None, dtype: torch.dtype | None) -> Loaded:
    config = read_hf_config(path)
    model = from_hf_config(config, str(path / "config.json"))
    assert model.vocab_size is not None
    parts = [part for native in native_tensors(model, model.vocab_size) for part in native.parts]
    reader = SafetensorsReader(path)
    reader.check(parts, ignored=["lm_head.weight"] if model.tie_embeddings else [])
    found = tokenizer or tokenizer_of(path)
    if found is None:
        raise ConfigError(f"{path}: no tokenizer in this folder; name one with --tokenizer")
    encoder = load_tokenizer(found, model.vocab_size)
    tensors = ((part.name, reader.read(part.name)) for part in parts)
    built = _build(config, tensors, dtype or reader.dtype(parts))
    return Loaded(built, encoder, _adds_bos(path))


def _build(config: dict[str, Any], tensors: Iterator[tuple[str, torch.Tensor]], dtype: torch.dtype) -> Any:
    import transformers

    import pretrain.convert.wonton  # noqa: F401  transformers then knows it

    transformers.logging.set_verbosity_error()
    options = {key: value for key, value in config.items() if key not in NOT_PASSED_ON and not key.startswith("_")}
    made = transformers.AutoConfig.for_model(config["model_type"], **options)
    with torch.device("meta"):  # no numbers are drawn only to be overwritten
        model = transformers.AutoModelForCausalLM.from_config(made, dtype=dtype)
    weights = {name: tensor.to(dtype) for name, tensor in tensors}
    missing = model.load_state_dict(weights, assign=True, strict=False).missing_keys
    model.tie_weights()
    assert set(missing) <= {"lm_head.weight"}, missing
    model.model.rotary_emb = type(model.model.rotary_emb)(config=made)
    return model.eval().requires_grad_(False)


def _adds_bos(path: Path) -> bool:
    file = path / "tokenizer_config.json"
    try:
        return bool(json.loads(file.read_text("utf-8")).get("add_bos_token")) if file.is_file() else False
    except (ValueError, AttributeError):
        raise CheckpointError(f"{file}: not valid JSON") from None
